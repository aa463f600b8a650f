"""Training of heatmaps: the examples with their targets, and the loss."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from qlx.inputs import (
    ABSENT,
    ImagePreprocessor,
    KeypointSplit,
    gaussian_target,
    keypoint_batch,
    rescaled,
)

__all__ = ["HeatmapDataset", "drawn_target", "focal_loss", "hold_statistics", "share_statistics"]


class HeatmapDataset(Dataset[dict[str, Any]]):
    """Frames prepared, and their targets drawn, when they are asked for; `grid` is (height, width) in cells."""

    def __init__(
        self, split: KeypointSplit, preprocessor: ImagePreprocessor, grid: tuple[int, int]
    ) -> None:
        self.split = split
        self.preprocessor = preprocessor
        self.grid = grid

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = keypoint_batch(self.split, self.preprocessor, [index])
        target = drawn_target(batch.labels[0], self.grid, self.split.sigma)
        return {
            "pixel_values": torch.from_numpy(batch.inputs["pixel_values"][0]),
            "labels": torch.from_numpy(target),
        }


def drawn_target(labels: NDArray[Any], grid: tuple[int, int], sigma: float) -> NDArray[np.float32]:
    """The heatmaps `[K, h, w]` to learn of one frame, from its labels `[K, 5]`."""
    cells = rescaled(labels[:, :2], labels[:, 3:5], np.array(grid[::-1]))
    return gaussian_target(cells, labels[:, 2] != ABSENT, grid, sigma)


def hold_statistics(model: nn.Module) -> None:
    """Let batch normalisation (in ViTPose's classic head) use the base's statistics, and leave them as they are.

    In training mode it would replace them, batch by batch, in a base that is said to be frozen.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def share_statistics(model: nn.Module) -> None:
    """Let batch normalisation see the batches of all processes as one, which each step then does."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = _SharedBatchNorm2d


class _SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over all processes; PyTorch's own (`SyncBatchNorm`) runs on GPUs only."""

    def forward(self, input: Tensor) -> Tensor:
        """As the class above does, with mean and variance over the inputs of every process."""
        if not self.training:
            return super().forward(input)
        from torch.distributed.nn.functional import all_reduce

        sides = (0, 2, 3)
        count = input.new_tensor([input.numel() / input.shape[1]])
        sums = all_reduce(torch.cat([input.sum(sides), count]))
        total, mean = sums[-1], sums[:-1] / sums[-1]
        centred = input - mean[:, None, None]
        variance = all_reduce((centred**2).sum(sides)) / total
        self._remember(mean.detach(), (variance * total / (total - 1)).detach())
        scale = self.weight / (variance + self.eps).sqrt()
        normalized: Tensor = centred * scale[:, None, None] + self.bias[:, None, None]
        return normalized

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        share = self.momentum or 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """-Σ (1 - p)² t log p + p² (1 - t) log(1 - p) over the cells of a heatmap, averaged over heatmaps.

    The weighted binary cross entropy of TrackNetV2 (Sun et al. 2020, eq. 2; the focal loss of Lin et al.
    2017 with γ = 2): the thousand cells without a ball weigh next to nothing once they are known, so
    that they cannot drown the few with one.

    Args:
        logits: `[n, K, h, w]`, p is their sigmoid.
        target: of the same shape, 0 … 1.
    """
    there, nothing = functional.logsigmoid(logits), functional.logsigmoid(-logits)
    terms = nothing.exp() ** 2 * target * there + there.exp() ** 2 * (1 - target) * nothing
    return -terms.sum(dim=(-2, -1)).mean()
