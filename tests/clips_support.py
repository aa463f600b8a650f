"""Small clips with a ball that a tiny model learns to find in seconds, in TrackNet's layout."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["BRIGHT", "DIM", "draw_clips"]

BRIGHT, DIM = (230, 240, 90), (170, 130, 180)
SIZE = WIDTH, HEIGHT = 96, 54
RADIUS = 2.5


def draw_clips(
    root: Path, *, clips: int = 8, frames: int = 40, colour=BRIGHT, size=SIZE, absent: int = 0
) -> Path:
    """A ball that bounces off the frame's edges over coloured tiles; in the last `absent` frames there is none."""
    for number in range(1, clips + 1):
        random = np.random.default_rng([number, *colour])
        directory = root / f"game{1 + number % 2}" / f"Clip{number}"
        directory.mkdir(parents=True)
        ground = _tiles(random, *size)
        rows = []
        for at, place in enumerate(_bounces(random, frames, *size)):
            name = f"{at:04}.png"
            there = at < frames - absent
            pixels = _with_ball(ground, place, colour) if there else ground
            pixels = pixels + random.normal(0, 4, pixels.shape)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(directory / name)
            shown = (f"{place[0]:.2f}", f"{place[1]:.2f}", 0) if there else ("", "", "")
            rows.append((name, int(there), *shown))
        write_labels(directory / "Label.csv", rows)
    return root


def write_labels(file: Path, rows) -> None:
    """A label file, as the data set has them."""
    with open(file, "w", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(("file name", "visibility", "x-coordinate", "y-coordinate", "status"))
        writer.writerows(rows)


def _tiles(random, width, height):
    tiles = random.uniform(20, 110, (height // 6 + 1, width // 6 + 1, 3))
    return tiles.repeat(6, axis=0).repeat(6, axis=1)[:height, :width]


def _bounces(random, frames, width, height):
    ends = np.array([width, height]) - 1.0
    place, speed = random.uniform(10, ends - 10), random.uniform(-1, 1, 2) * (6, 4)
    for _ in range(frames):
        place = place + speed
        speed = np.where((place < 4) | (place > ends - 4), -speed, speed)
        place = place.clip(4, ends - 4)
        yield place


def _with_ball(ground, place, colour):
    y, x = np.mgrid[: ground.shape[0], : ground.shape[1]]
    cover = np.clip(RADIUS + 0.5 - np.hypot(x - place[0], y - place[1]), 0, 1)[..., None]
    return ground * (1 - cover) + cover * np.array(colour)
