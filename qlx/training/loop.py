"""The steps of a training in one process, alone or among others: from a job to the weights that are its result."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlx.checkpoint import is_checkpoint
from qlx.models import heatmap_grid
from qlx.training.distributed import Process
from qlx.training.evaluation import HeldOut, Measured, measure
from qlx.training.heatmaps import HeatmapDataset, share_statistics
from qlx.training.job import Job, model_again
from qlx.training.material import ImageMaterial, KeypointMaterial
from qlx.training.sharding import shard_model, unwrapped
from qlx.training.state import State, collect_state, open_state, put_trained
from qlx.training.trainers import ImageDataset, heatmap_trainer, image_trainer, text_trainer

__all__ = ["Ended", "Loop"]


@dataclass(frozen=True)
class Ended:
    """What is left of a loop: the last state, the trainer's own, and the held-out curve."""

    state: State
    trainer_state: Any
    held_out: HeldOut


class Loop:
    """The training of one process. Its model is whole, or a shard of it.

    Attributes:
        state: the checked state to go on from; None for a training that starts.
    """

    def __init__(
        self, job: Job, process: Process, work: Path, state_at: Path, *, shard: bool
    ) -> None:
        self.job, self.process, self.sharded = job, process, shard
        self.state = open_state(state_at, job.belongs_to) if is_checkpoint(state_at) else None
        self.trainer = _trainer(job, work, process)
        section = job.recipe.training
        self.trainer.state_directory, self.trainer.belongs_to = state_at, job.belongs_to
        self.trainer.task, self.trainer.process = job.recipe.task, process
        on_gpu = torch.cuda.is_available()
        self.trainer.in_bfloat16 = on_gpu and job.recipe.base.dtype == "bfloat16"
        self.trainer.held_out = HeldOut(self.measure, section, process)
        if shard:
            shard_model(job.model, process.count)
            unwrapped(self.trainer)

    def measure(self) -> Measured:
        """The held-out scores; all processes take part."""
        return measure(self.job, self.process, sharded=self.sharded)

    def run(self) -> None:
        """All steps that are left."""
        self.process.draw_apart(self.job.recipe.training.seed)
        state = None if self.state is None else str(self.state)
        self.trainer.train(resume_from_checkpoint=state)

    def end(self) -> Ended:
        """Put the weights that are the result into a whole model; all processes take part."""
        trainer, held_out = self.trainer, self.trainer.held_out
        state = collect_state(trainer.model, trainer.optimizer, trainer.lr_scheduler, self.process)
        self.trainer = None
        if self.sharded and self.process.first:
            self.job.model = nn.Identity()
            gc.collect()
            self.job.model = model_again(self.job)
            put_trained(state.trained, self.job.model, "the last step")
        held_out.restore(self.job.model)
        return Ended(state, trainer.state, held_out)


def _trainer(job: Job, work: Path, process: Process) -> Any:
    section, material = job.recipe.training, job.material
    if isinstance(material, ImageMaterial):
        dataset = ImageDataset(material.train, material.preprocessor)
        return image_trainer(job.model, dataset, section, work)
    if isinstance(material, KeypointMaterial):
        config: Any = job.model.config
        frames = HeatmapDataset(material.train, material.preprocessor, heatmap_grid(config))
        if process.count > 1:
            share_statistics(job.model)
        return heatmap_trainer(job.model, frames, section, work)
    tokenizer = material.fast_tokenizer(work)
    return text_trainer(
        job.model, material.train, tokenizer, section, work, job.recipe.data.max_length
    )
