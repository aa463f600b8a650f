"""The built-in vision data: scikit-learn's 8×8 digits, rendered as 32×32 colour images.

`plain` are light digits on black. `shifted` are the same digits turned by 30 to 60 degrees, in dark
random colours on light random ground, with noise: what a model pretrained on `plain` is bad at.
"""

import numpy as np
from numpy.typing import NDArray

from qlx.errors import require

__all__ = ["CLASSES", "SIDE", "digits"]

SIDE = 32
CLASSES = tuple(str(digit) for digit in range(10))

_ANGLE = (30.0, 60.0)
_COLOUR_RANGE = 100
_NOISE = 15.0

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


def digits(variant: str, seed: int, copies: int = 1) -> tuple[Images, Labels]:
    """All 1,797 digits, `copies` times over, each copy shifted differently.

    Returns:
        images uint8 [copies · 1797, 32, 32, 3] and labels int64; the same for the same arguments.
    """
    data = require("sklearn.datasets", "train").load_digits()
    grey = np.stack([_render(image) for image in data.images])
    labels = np.tile(data.target.astype(np.int64), copies)
    if variant == "plain":
        return np.tile(np.repeat(grey[..., None], 3, axis=-1), (copies, 1, 1, 1)), labels
    random = np.random.default_rng([seed, 1])
    shifted = [_shift(image, random) for _ in range(copies) for image in grey]
    return np.stack(shifted), labels


def _render(image: NDArray[np.float64]) -> Images:
    """An 8×8 image of 0 … 16 as a grey 32×32 one of 0 … 255."""
    pillow = require("PIL.Image", "train")
    grey = pillow.fromarray((image * (255 / 16)).round().astype(np.uint8))
    return np.asarray(grey.resize((SIDE, SIDE), pillow.Resampling.BICUBIC))


def _shift(grey: Images, random: "np.random.Generator") -> Images:
    pillow = require("PIL.Image", "train")
    turned = pillow.fromarray(grey).rotate(
        random.uniform(*_ANGLE), resample=pillow.Resampling.BILINEAR
    )
    ink = np.asarray(turned, np.float64)[..., None] / 255
    dark = random.uniform(0, _COLOUR_RANGE, 3)
    light = random.uniform(255 - _COLOUR_RANGE, 255, 3)
    coloured = light + (dark - light) * ink + random.normal(0, _NOISE, (SIDE, SIDE, 3))
    return coloured.clip(0, 255).astype(np.uint8)
