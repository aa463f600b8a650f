"""Video frames with the place of a ball, in the layout of TrackNet's tennis data set (Huang et al. 2019).

    game1/Clip1/0000.jpg …    frames in order
    game1/Clip1/Label.csv     file name,visibility,x-coordinate,y-coordinate,status

`visibility` is 0 when the ball is not in the frame (and the coordinates are empty), 1 when it is easy to
see, 2 when it is hard to see, 3 when something hides it; `status` (flying, hit, bouncing) is not used.
Frames are decoded when they are needed, so a data set may be larger than memory.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qlx.errors import InputRefused
from qlx.inputs.images import open_image

__all__ = ["ABSENT", "LABEL_FILE", "Clip", "KeypointSplit", "keypoint_split", "read_clips"]

LABEL_FILE = "Label.csv"
ABSENT = 0
_COLUMNS = ("file name", "visibility", "x-coordinate", "y-coordinate")
_VISIBILITIES = ("0", "1", "2", "3")


@dataclass(frozen=True)
class Clip:
    """One clip: its frames in order and, for each, (x, y, visibility) float32 `[n, 3]` in its own pixels."""

    directory: Path
    frames: tuple[Path, ...]
    places: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.frames)


@dataclass(frozen=True)
class KeypointSplit:
    """Frames with places: each item the files a model sees at once, the labelled one last.

    `places` are (x, y, visibility) of each keypoint, float32 `[n, K, 3]`, in pixels of that frame as it
    is on disk; `names` name the K keypoints. `sigma` is that of the recipe, in cells.
    """

    frames: tuple[tuple[Path, ...], ...]
    places: NDArray[np.float32]
    names: tuple[str, ...]
    sigma: float

    def __len__(self) -> int:
        return len(self.frames)


def read_clips(root: Path) -> list[Clip]:
    """All clips below a directory, in the order of their paths.

    Raises:
        InputRefused: there is none, or a label file is wrong; the message names file and line.
    """
    if not root.is_dir():
        raise InputRefused(
            f"{root}: no such directory (source tracknet needs game*/Clip*/{LABEL_FILE})"
        )
    files = sorted(root.glob(f"game*/Clip*/{LABEL_FILE}"), key=_in_order)
    if not files:
        raise InputRefused(
            f"{root}: no clips; frames and labels are looked for as game*/Clip*/{LABEL_FILE}"
        )
    clips = [_clip(file) for file in files]
    open_image(clips[0].frames[0])
    return clips


def _in_order(file: Path) -> tuple[tuple[int, str], ...]:
    """Game and clip by number, then by name: `Clip10` after `Clip9`."""
    parts = file.parts[-3:-1]
    numbers = ("".join(filter(str.isdigit, part)) for part in parts)
    return tuple((int(number or 0), part) for number, part in zip(numbers, parts, strict=True))


def _clip(file: Path) -> Clip:
    rows = list(_rows(file))
    if not rows:
        raise InputRefused(f"{file}: labels no frame")
    frames = tuple(path for path, _ in rows)
    if len(set(frames)) != len(frames):
        twice = next(path for path in frames if frames.count(path) > 1)
        raise InputRefused(f"{file}: labels {twice.name} twice")
    return Clip(file.parent, frames, np.array([place for _, place in rows], np.float32))


def _rows(file: Path) -> Iterator[tuple[Path, tuple[float, float, float]]]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as opened:
            reader = csv.DictReader(opened, strict=True, skipinitialspace=True)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise InputRefused(f"{file}: line 1: the column {missing[0]!r} is missing")
            for row in reader:
                yield _row(row, file, f"{file}: line {reader.line_num}")
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputRefused(f"{file}: not a UTF-8 csv file ({error})") from error


def _row(
    row: dict[str, str | None], file: Path, where: str
) -> tuple[Path, tuple[float, float, float]]:
    name, visibility, x, y = ((row[column] or "").strip() for column in _COLUMNS)
    frame = file.parent / name
    if not name or Path(name).name != name or not frame.is_file():
        raise InputRefused(f"{where}: no frame {name!r} beside it")
    if visibility not in _VISIBILITIES:
        raise InputRefused(
            f"{where}: visibility {visibility!r} is not one of {', '.join(_VISIBILITIES)}"
        )
    if int(visibility) == ABSENT:
        return frame, (0.0, 0.0, float(ABSENT))
    return frame, (_coordinate(x, "x", where), _coordinate(y, "y", where), float(visibility))


def _coordinate(text: str, axis: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 2**16:
        raise InputRefused(
            f"{where}: {axis}-coordinate {text!r} is not a place in the frame; only visibility 0 goes without"
        )
    return value


def keypoint_split(
    clips: list[Clip], frames: int, sigma: float, limit: int | None
) -> KeypointSplit:
    """Every frame of some clips with the `frames` - 1 before it, at most `limit`, spread evenly over them.

    The first frames of a clip have none before them; the first one stands in.
    """
    items = [
        tuple(clip.frames[max(0, at - back)] for back in reversed(range(frames)))
        for clip in clips
        for at in range(len(clip))
    ]
    places = np.concatenate([clip.places for clip in clips])[:, None, :]
    kept = np.arange(len(items))
    if limit is not None and limit < len(items):
        kept = np.linspace(0, len(items) - 1, limit).round().astype(np.int64)
    return KeypointSplit(tuple(items[at] for at in kept), places[kept], ("ball",), sigma)
