"""Images to model inputs, in numpy and Pillow: the same pixels as transformers' PIL image processors.

Reads and writes `preprocessor_config.json` as transformers does, so that a directory works in both.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qlx.checkpoint import canonical_json, load_json
from qlx.errors import CorruptCheckpoint, InputRefused, Unsupported, require

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["PREPROCESSOR_FILE", "ImagePreprocessor", "as_image", "open_image", "too_many_pixels"]

PREPROCESSOR_FILE = "preprocessor_config.json"
MAX_PIXELS = 64 * 2**20
"""Largest image that is decoded, in pixels; larger ones are refused before decoding."""

_MAX_SIDE = 8192


@dataclass(frozen=True)
class ImagePreprocessor:
    """Resize, crop, rescale and normalize, each as in `preprocessor_config.json`.

    `size` is (height, width), or one number for the shortest edge; `crop` (height, width) is cut
    from the middle after resizing. `resample` is Pillow's filter number (2 bilinear, 3 bicubic).
    `kind` is the transformers class the file names. A model that sees several consecutive frames at
    once takes `frames` of them, stacked along the channels, the latest last; the field `num_frames`
    of the file is qlx's own.
    """

    size: tuple[int, int] | int | None = (224, 224)
    crop: tuple[int, int] | None = None
    resample: int = 2
    rescale: float | None = 1 / 255
    mean: tuple[float, ...] | None = (0.5, 0.5, 0.5)
    std: tuple[float, ...] | None = (0.5, 0.5, 0.5)
    kind: str = "ViTImageProcessor"
    frames: int = 1

    @classmethod
    def from_directory(cls, directory: Path) -> "ImagePreprocessor":
        """Read `preprocessor_config.json`; without one, ViT's defaults at 224 pixels are not guessed.

        Raises:
            InputRefused: there is no such file.
            CorruptCheckpoint: a field is not what transformers writes.
            Unsupported: it asks for a step that is not known here (padding, for example).
        """
        path = Path(directory) / PREPROCESSOR_FILE
        if not path.is_file():
            raise InputRefused(
                f"{path}: missing, so it is not known how images are prepared for this model"
            )
        try:
            return cls._from_config(load_json(path))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptCheckpoint(
                f"{path}: not an image preprocessor configuration ({error})"
            ) from error

    @classmethod
    def _from_config(cls, config: dict[str, Any]) -> "ImagePreprocessor":
        if config.get("do_pad"):
            raise Unsupported(f"{PREPROCESSOR_FILE}: do_pad is not supported")
        normalize = config.get("do_normalize", True)
        crop = _size(config["crop_size"]) if config.get("do_center_crop") else None
        if isinstance(crop, int):
            crop = (crop, crop)
        return cls(
            size=_size(config.get("size", 224)) if config.get("do_resize", True) else None,
            crop=crop,
            resample=int(config.get("resample", 2)),
            rescale=float(config.get("rescale_factor", 1 / 255))
            if config.get("do_rescale", True)
            else None,
            mean=_channels(config["image_mean"]) if normalize else None,
            std=_channels(config["image_std"]) if normalize else None,
            kind=str(config.get("image_processor_type", "ViTImageProcessor")),
            frames=_side(config.get("num_frames", 1)),
        )

    def to_bytes(self) -> bytes:
        """The content of `preprocessor_config.json`; reading it back gives an equal preprocessor."""
        size = (
            {"shortest_edge": self.size} if isinstance(self.size, int) else _height_width(self.size)
        )
        config = {
            "image_processor_type": self.kind,
            "do_resize": self.size is not None,
            "size": size,
            "resample": self.resample,
            "do_center_crop": self.crop is not None,
            "crop_size": _height_width(self.crop),
            "do_rescale": self.rescale is not None,
            "rescale_factor": self.rescale,
            "do_normalize": self.mean is not None,
            "image_mean": None if self.mean is None else list(self.mean),
            "image_std": None if self.std is None else list(self.std),
            "num_frames": None if self.frames == 1 else self.frames,
        }
        return canonical_json({key: value for key, value in config.items() if value is not None})

    def __call__(self, images: Sequence[Any]) -> NDArray[np.float32]:
        """Prepare images: Pillow images, paths, or uint8 arrays [H, W, 3] or [H, W]. Returns float32 [n, 3, H, W].

        For a model of several frames each item is a sequence of so many, and 3 · frames channels come
        out; a single image stands for all of them.

        Raises:
            InputRefused: not images, or another number of frames.
        """
        return np.stack([self._stacked(image) for image in images])

    def require_frames(self, count: int) -> None:
        """Refuse a number of frames that is neither one nor what the model sees at once.

        Raises:
            InputRefused: another number.
        """
        if count not in (1, self.frames):
            raise InputRefused(f"the model sees {self.frames} frames at once, not {count}")

    def _stacked(self, item: Any) -> NDArray[np.float32]:
        given = list(item) if isinstance(item, list | tuple) else [item]
        self.require_frames(len(given))
        ready = {id(image): self._one(image) for image in given}
        return np.concatenate([ready[id(image)] for image in given * (self.frames // len(given))])

    def _one(self, image: Any) -> NDArray[np.float32]:
        picture = self._resize(as_image(image))
        pixels = np.asarray(picture).transpose(2, 0, 1)
        if self.crop is not None:
            pixels = _center_crop(pixels, *self.crop)
        values = pixels.astype(np.float32)
        if self.rescale is not None:
            values = (pixels.astype(np.float64) * self.rescale).astype(np.float32)
        if self.mean is not None and self.std is not None:
            mean, std = (np.array(value, np.float32) for value in (self.mean, self.std))
            values = ((values.T - mean) / std).T.astype(np.float32)
        return np.ascontiguousarray(values, dtype=np.float32)

    def _resize(self, picture: "Image") -> "Image":
        if self.size is None:
            return picture
        height, width = (
            self.size if isinstance(self.size, tuple) else _shortest_edge(picture, self.size)
        )
        return picture.resize((width, height), resample=self.resample)


def _size(value: Any) -> tuple[int, int] | int:
    """A size as transformers writes it: a number, height and width, or a shortest edge."""
    if isinstance(value, int):
        return _side(value), _side(value)
    if "height" in value:
        return _side(value["height"]), _side(value["width"])
    if set(value) == {"shortest_edge"}:
        return _side(value["shortest_edge"])
    raise ValueError(f"size {value}")


def _side(value: Any) -> int:
    if not isinstance(value, int) or not 0 < value <= _MAX_SIDE:
        raise ValueError(f"size {value!r} is not between 1 and {_MAX_SIDE}")
    return value


def _channels(values: Any) -> tuple[float, ...]:
    if len(values) != 3:
        raise ValueError("image_mean and image_std need three values")
    return tuple(float(value) for value in values)


def _height_width(size: tuple[int, int] | None) -> dict[str, int] | None:
    return None if size is None else {"height": size[0], "width": size[1]}


def _shortest_edge(picture: "Image", edge: int) -> tuple[int, int]:
    """(height, width) with the shorter side at `edge`, as transformers rounds it (down)."""
    width, height = picture.size
    short, long = sorted((width, height))
    scaled = int(edge * long / short)
    return (scaled, edge) if width <= height else (edge, scaled)


def _center_crop(pixels: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Cut [C, height, width] from the middle; a smaller image is set into zeros, as transformers does."""
    if height > pixels.shape[1] or width > pixels.shape[2]:
        tall, wide = max(height, pixels.shape[1]), max(width, pixels.shape[2])
        padded = np.zeros((pixels.shape[0], tall, wide), pixels.dtype)
        top, left = math.ceil((tall - pixels.shape[1]) / 2), math.ceil((wide - pixels.shape[2]) / 2)
        padded[:, top : top + pixels.shape[1], left : left + pixels.shape[2]] = pixels
        pixels = padded
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    return pixels[:, top : top + height, left : left + width]


def as_image(image: Any) -> "Image":
    """A Pillow RGB image from a path, encoded bytes, a Pillow image or a uint8 array [H, W, 3] or [H, W].

    Raises:
        InputRefused: not an image.
    """
    if isinstance(image, str | Path):
        return open_image(image)
    if isinstance(image, bytes):
        return open_image(io.BytesIO(image))
    pillow = require("PIL.Image", "train")
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise InputRefused(
                f"an image array must be uint8 [H, W, 3] or [H, W], not {image.dtype} {image.shape}"
            )
        image = pillow.fromarray(image)
    return _rgb(image, "the image")


def open_image(source: Any) -> "Image":
    """Decode an image file (a path or a binary stream) to RGB.

    Raises:
        InputRefused: not an image Pillow reads, or more than 64 million pixels.
    """
    pillow = require("PIL.Image", "train")
    try:
        with pillow.open(source) as image:
            if image.size[0] * image.size[1] > MAX_PIXELS:
                raise too_many_pixels(_named(source))
            return _rgb(image, _named(source))
    except pillow.DecompressionBombError as error:
        raise too_many_pixels(_named(source)) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise InputRefused(f"{_named(source)}: not an image that can be read ({error})") from error


def _rgb(image: "Image", what: str) -> "Image":
    """The image in 8 bits a colour. Pillow's own conversion cuts greater values off: 16 bits become white."""
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        scaled = ((values * 255 + 32767) // 65535).astype(np.uint8)
        image = require("PIL.Image", "train").fromarray(scaled)
    if image.mode in ("I", "F"):
        raise InputRefused(
            f"{what}: its values ({'32-bit integers' if image.mode == 'I' else 'floats'}) have no known white; "
            "save it with 8 or 16 bits"
        )
    converted: Image = image.convert("RGB")
    return converted


def too_many_pixels(what: str) -> InputRefused:
    """The error for an image that is too large; Pillow stops at a limit of its own before it tells the size."""
    return InputRefused(f"{what}: too many pixels, more than {MAX_PIXELS:,}; scale it down")


def _named(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else "image"
