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

__all__ = ["HeatmapDataset", "drawn_target", "focal_loss", "hold_statistics"]


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
