"""The training loop: transformers' Trainer for pictures, TRL's SFTTrainer for text, made resumable and strict.

Both keep their own arithmetic. What is replaced: the order of the data (a function of seed and
epoch), what is saved (no pickle), and what happens on a loss that is no number (it stops).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from qlx.checkpoint import Task
from qlx.errors import CheckFailed, Unsupported, require
from qlx.inputs import Encoded, ImagePreprocessor, ImageSplit
from qlx.recipe import TrainingSection
from qlx.training.distributed import Process
from qlx.training.evaluation import HeldOut
from qlx.training.heatmaps import HeatmapDataset, focal_loss, hold_statistics
from qlx.training.packing import PackedRows, pack, packed_columns
from qlx.training.state import (
    collect_state,
    load_optimizer,
    load_random,
    load_trained,
    save_state,
)
from qlx.training.trainable import require_in_optimizer

__all__ = [
    "EpochSampler",
    "ImageDataset",
    "StrictTrainer",
    "check_optimizer",
    "heatmap_trainer",
    "image_trainer",
    "text_trainer",
]


class EpochSampler(Sampler[int]):
    """A new order of the examples in each epoch, from the seed and the epoch's number alone."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng([self.seed, self.epoch]).permutation(self.count).tolist())

    def __len__(self) -> int:
        return self.count


class ImageDataset(Dataset[dict[str, Any]]):
    """Images prepared when they are asked for."""

    def __init__(self, split: ImageSplit, preprocessor: ImagePreprocessor) -> None:
        self.split = split
        self.preprocessor = preprocessor

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = self.preprocessor([self.split.images[index]])[0]
        return {"pixel_values": torch.from_numpy(pixels), "labels": int(self.split.labels[index])}


class StrictTrainer:
    """Mixed into a transformers `Trainer` before the class itself.

    `state_directory` receives the state; `belongs_to` identifies the training; `task` is the
    recipe's; `held_out` looks at the held-out examples; `in_bfloat16` says whether a GPU multiplies in bfloat16. They
    are set after construction.
    """

    state_directory: Path
    belongs_to: str
    task: Task
    held_out: HeldOut
    process: Process
    in_bfloat16: bool = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        trainer: Any = self
        dataset = trainer.train_dataset if train_dataset is None else train_dataset
        return EpochSampler(len(dataset), trainer.args.seed)

    def create_optimizer(self, model: Any = None) -> Any:
        """As the trainer does, then check that it holds the trainable parameters and no others."""
        trainer: Any = super()
        optimizer = trainer.create_optimizer(model)
        require_in_optimizer(getattr(self, "model"), optimizer)  # noqa: B009 - the mixin's other half has it
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass.

        Raises:
            CheckFailed: the loss is not finite.
        """
        trainer: Any = super()
        loss: torch.Tensor = trainer.training_step(*args, **kwargs)
        if not bool(torch.isfinite(loss)):
            step = getattr(self, "state").global_step + 1  # noqa: B009
            raise CheckFailed(
                f"the loss is {loss.item()} at step {step}; lower training.learning_rate, or use float32 "
                "for quantization.compute_dtype and base.dtype"
            )
        return loss

    def autocast_smart_context_manager(
        self, cache_enabled: bool | None = True
    ) -> AbstractContextManager[Any]:
        """Around the forward pass: on a GPU, what a bfloat16 base meets is multiplied in bfloat16.

        Adapters are float32. Without this PyTorch would multiply their small factors with inputs widened to
        float32, which takes a fifth more time and a quarter more memory. Layers that need float32 switch it off.
        """
        if not self.in_bfloat16:
            return nullcontext()
        return torch.autocast("cuda", torch.bfloat16, cache_enabled=bool(cache_enabled))

    def _clip_grad_norm(self, model: Any) -> Any:
        """Shorten gradients that are too long; of a sharded model the length is that of all shards."""
        trainer: Any = super()
        norm = trainer._clip_grad_norm(model)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        trainer: Any = self
        step, last = trainer.state.global_step, trainer.state.max_steps
        trainer.control.should_evaluate = step > self._looked_at and self.held_out.due(step, last)
        inherited: Any = super()
        inherited._maybe_log_save_evaluate(*args, **kwargs)

    _looked_at = 0

    def _evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the held-out examples, and end the training when it has stopped to get better on them."""
        trainer: Any = self
        self._looked_at = trainer.state.global_step
        row = self.held_out.look(self._looked_at, trainer.model).row
        trainer.control = trainer.callback_handler.on_log(
            trainer.args, trainer.state, trainer.control, row
        )
        if self.held_out.enough:
            trainer.control.should_training_stop = trainer.control.should_log = True
        return row

    def _determine_best_metric(self, *_: Any, **__: Any) -> bool:
        return False  # `held_out` knows

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the trainer does; but a training that had ended when it was killed takes no further step."""
        trainer: Any = self
        if self.held_out.enough or trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
            return
        inherited: Any = super()
        inherited._run_epoch(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        trainer: Any = self
        state = collect_state(trainer.model, trainer.optimizer, trainer.lr_scheduler, self.process)
        if self.process.first:
            save_state(
                self.state_directory,
                state,
                trainer_state=trainer.state,
                task=self.task,
                belongs_to=self.belongs_to,
                beside=self.held_out.save,
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(Path(resume_from_checkpoint), getattr(self, "model"))  # noqa: B009
        self.held_out.load(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        trainer: Any = self
        if checkpoint is not None:
            load_optimizer(Path(checkpoint), trainer.optimizer, trainer.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random(Path(checkpoint), self.process.rank)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """No gradient scaler is used."""


_OPTIMIZERS = {"adamw": "adamw_torch"}
"""The optimizers of recipes that transformers calls by another name."""


def check_optimizer(section: TrainingSection, *, sharded: bool = False) -> None:
    """Check that this machine and a model in shards can do with a recipe's optimizer.

    Raises:
        Unsupported: they cannot.
        MissingExtra: it is bitsandbytes' own, which is not installed.
    """
    name = section.optimizer
    if name.endswith("_8bit"):
        require("bitsandbytes", "train")
    if name.startswith("paged") and not torch.cuda.is_available():
        raise Unsupported(
            f"training.optimizer: {name} keeps its state on the GPU's pages and this machine has no GPU; "
            f"choose {name.removeprefix('paged_')} or adamw"
        )
    if sharded and name not in ("adamw", "sgd"):
        raise Unsupported(
            f"training.optimizer: {name} does not work on shards; choose adamw or sgd, or train without --shard"
        )


def _arguments(section: TrainingSection, work: Path) -> dict[str, Any]:
    """The recipe's training section as keyword arguments of transformers' `TrainingArguments`."""
    return {
        "output_dir": str(work),
        "per_device_train_batch_size": section.batch_size,
        "gradient_accumulation_steps": section.gradient_accumulation,
        "num_train_epochs": section.epochs,
        "max_steps": section.max_steps or -1,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": "constant_with_warmup"
        if section.schedule == "constant"
        else section.schedule,
        "warmup_steps": section.warmup_ratio,
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "logging_strategy": "steps",
        "logging_steps": section.log_every,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": section.save_every,
        "seed": section.seed,
        "optim": _OPTIMIZERS.get(section.optimizer, section.optimizer),
        "bf16": False,
        "fp16": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "report_to": [],  # `reporting_callbacks` knows where to
        "remove_unused_columns": False,
        "torch_compile": section.compile,
        "ddp_find_unused_parameters": False,  # every trainable parameter has a part in the loss
        **_checkpointing(section),
    }


def _checkpointing(section: TrainingSection) -> dict[str, bool]:
    """The field that saves memory by computing activations twice; transformers 5 renames it on the way."""
    fields = require("transformers", "train").TrainingArguments.__dataclass_fields__
    name = (
        "activation_checkpointing"
        if "activation_checkpointing" in fields
        else "gradient_checkpointing"
    )
    return {name: section.gradient_checkpointing}


def image_trainer(model: Any, dataset: ImageDataset, section: TrainingSection, work: Path) -> Any:
    """A transformers Trainer for a classifier."""
    transformers = require("transformers", "train")

    class ImageTrainer(StrictTrainer, transformers.Trainer):  # type: ignore[name-defined,misc]
        pass

    arguments = transformers.TrainingArguments(**_arguments(section, work))
    return _quiet(ImageTrainer(model=model, args=arguments, train_dataset=dataset))


def heatmap_trainer(
    model: Any, dataset: HeatmapDataset, section: TrainingSection, work: Path
) -> Any:
    """A transformers Trainer for a heatmap model, which has no loss of its own."""
    transformers = require("transformers", "train")

    class HeatmapTrainer(StrictTrainer, transformers.Trainer):  # type: ignore[name-defined,misc]
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any
        ) -> Any:
            if hasattr(self.model, "disable_adapter"):
                hold_statistics(self.model)
            outputs = model(pixel_values=inputs["pixel_values"])
            loss = focal_loss(outputs.heatmaps, inputs["labels"])
            return (loss, outputs) if return_outputs else loss

    arguments = transformers.TrainingArguments(**_arguments(section, work))
    trainer = HeatmapTrainer(model=model, args=arguments, train_dataset=dataset)
    trainer.model_accepts_loss_kwargs = False  # the loss is a mean: accumulated ones are averaged
    return _quiet(trainer)


def text_trainer(
    model: Any,
    items: Sequence[Encoded],
    tokenizer: Any,
    section: TrainingSection,
    work: Path,
    max_length: int,
) -> Any:
    """TRL's SFTTrainer on texts that are tokenized already; `tokenizer` is transformers' fast one.

    TRL rounds the adapter of a quantized model to bfloat16; here it keeps the dtype and the values
    it was attached with.
    """
    datasets, trl = require("datasets", "train"), require("trl", "train")

    class TextTrainer(StrictTrainer, trl.SFTTrainer):  # type: ignore[name-defined,misc]
        pass

    columns, collator = _columns(items), None
    if section.packing:
        columns = packed_columns(pack(items, max_length))
        collator = PackedRows(tokenizer.pad_token_id)
    dataset = datasets.Dataset.from_dict(columns)
    arguments = trl.SFTConfig(
        **_arguments(section, work),
        max_length=max_length,
        packing=False,  # TRL's own needs flash attention; ours is in `columns`
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    kept = {
        name: value.detach().clone()
        for name, value in model.named_parameters()
        if value.requires_grad
    }
    trainer = TextTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        data_collator=collator,
    )
    for name, value in trainer.model.named_parameters():
        if name in kept:
            value.data = kept[name].to(value.device)  # a GPU has the model by now
    return _quiet(trainer)


def _columns(items: Sequence[Encoded]) -> dict[str, list[list[int]]]:
    return {"input_ids": [item.ids for item in items], "labels": [item.labels for item in items]}


def _quiet(trainer: Any) -> Any:
    """Remove the callback that prints to standard output."""
    callback = require("transformers.trainer_callback", "train").PrinterCallback
    trainer.remove_callback(callback)
    return trainer
