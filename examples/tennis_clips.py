"""Tennis-like video clips with the place of the ball in every frame, drawn from nothing, the same every time.

    python examples/tennis_clips.py --output clips/day
    python examples/tennis_clips.py --output clips/night --condition night --first-game 6

They lie on disk as TrackNet's tennis data set does, so what learns from one can learn from the other:

    game1/Clip1/0000.jpg …    the frames
    game1/Clip1/Label.csv     file name,visibility,x-coordinate,y-coordinate,status

A game has its own court, advertising, crowd and camera. A clip is a rally: a ball flies in parabolas over
the net, bounces, and is hit back. What makes it hard to find is drawn as well: it is a few pixels large,
blurred by its motion, sometimes behind a player, and not the only thing of its colour. By night there is
less light: longer exposure and so more blur, more noise, and more balls that lie about.

Read it from `main` upwards: a clip is a `Rally` (where everything is, in metres) seen by a `Camera` (where that
is in the picture) and painted by `Painter` (what it looks like).
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Array = NDArray[np.float64]
Random = np.random.Generator
Colour = tuple[int, int, int]

# --- What is to be drawn

FPS = 30.0
GRAVITY = 9.81
HALF_WIDTH, HALF_LENGTH, SERVICE = 5.485, 11.885, 6.4  # metres: the doubles court
NET_HEIGHT = 1.0
BALL_RADIUS = 0.11  # three times a real ball's: small frames would lose a real one
FLYING, HIT, BOUNCING = 0, 1, 2  # the labels' status
ABSENT, EASY, HARD, HIDDEN = 0, 1, 2, 3  # the labels' visibility

COURTS: tuple[tuple[Colour, Colour], ...] = (  # inside and outside the lines
    ((52, 96, 158), (42, 122, 92)),
    ((64, 128, 84), (48, 98, 66)),
    ((176, 102, 66), (158, 92, 62)),
    ((88, 84, 150), (60, 110, 120)),
    ((58, 114, 176), (56, 108, 170)),
)
BALL: Colour = (214, 232, 74)


@dataclass(frozen=True)
class Condition:
    """How a game is lit and filmed.

    `light` scales everything, `noise` is that of the sensor (of 255), `shutter` the share of the time
    between two frames during which light is collected, `strays` how many balls lie about, and
    `contrast` how much of the ball's own colour arrives.
    """

    light: float
    noise: float
    shutter: float
    strays: int
    contrast: float


CONDITIONS = {
    "day": Condition(light=1.0, noise=3.0, shutter=0.3, strays=2, contrast=1.0),
    "night": Condition(light=0.5, noise=9.0, shutter=0.8, strays=6, contrast=0.85),
}

# --- Where things are: metres, x to the right, y away from the camera, z up, the net at y = 0


@dataclass(frozen=True)
class Moment:
    """One frame of a rally; `path` are the ball's places while the shutter is open [k, 3]."""

    path: Array
    players: tuple[Array, Array]  # near and far, on the ground
    status: int


class Rally:
    """A ball hit back and forth, and the two players who run after it."""

    def __init__(self, random: Random, condition: Condition) -> None:
        self.random, self.condition = random, condition
        side = random.choice((-1.0, 1.0))
        self.ball = np.array([random.uniform(-3, 3), side * HALF_LENGTH, 1.1])
        self.players = [np.array([0.0, -HALF_LENGTH - 0.8]), np.array([0.0, HALF_LENGTH + 0.8])]
        self.hit()

    def hit(self) -> None:
        """Send the ball to a place on the other side: it has to pass the net and bounce inside the court."""
        side = -np.sign(self.ball[1])
        self.target = np.array(
            [
                self.random.uniform(-0.8, 0.8) * HALF_WIDTH,
                side * self.random.uniform(0.55, 0.95) * HALF_LENGTH,
            ]
        )
        distance = np.linalg.norm(self.target - self.ball[:2])
        seconds = distance / self.random.uniform(17, 30)
        across = (self.target - self.ball[:2]) / seconds
        up = 0.5 * GRAVITY * seconds - self.ball[2] / seconds
        share = self.ball[1] / (self.ball[1] - self.target[1])  # of the way to the net
        height = self.ball[2] + up * share * seconds - 0.5 * GRAVITY * (share * seconds) ** 2
        self.velocity = np.array([*across, up + max(0.0, NET_HEIGHT + 0.3 - height) * 2 / seconds])
        self.bounced = False

    def step(self, seconds: float) -> int:
        """Let time pass; returns what happened to the ball."""
        self.velocity[2] -= GRAVITY * seconds
        self.ball = self.ball + self.velocity * seconds
        for number, player in enumerate(self.players):
            mine = (number == 0) == (self.velocity[1] < 0)
            wanted = self.target[0] if mine else 0.0
            player[0] += np.clip(wanted - player[0], -5 * seconds, 5 * seconds)
        if self.ball[2] < BALL_RADIUS and self.velocity[2] < 0:
            self.ball[2] = BALL_RADIUS
            self.velocity *= (0.75, 0.75, -0.72)
            if self.bounced:  # out of reach: somebody hits it anyway, low
                self.hit()
                return HIT
            self.bounced = True
            return BOUNCING
        if self.bounced and abs(self.ball[1]) > HALF_LENGTH + 0.3:
            self.hit()
            return HIT
        return FLYING

    def moments(self, count: int, steps: int = 12) -> Iterator[Moment]:
        """Frame by frame: the ball's path while the shutter is open, then the dark rest of the time."""
        lit = max(1, round(steps * self.condition.shutter))
        for _ in range(count):
            path, status = [], FLYING
            for at in range(steps):
                if at < lit:
                    path.append(self.ball.copy())
                status = self.step(1 / FPS / steps) or status
            near, far = (player.copy() for player in self.players)
            yield Moment(np.array(path), (near, far), status)


class Camera:
    """Behind and above the near baseline, as in a broadcast; a little different in each game."""

    def __init__(self, random: Random, width: int, height: int) -> None:
        self.size = width, height
        self.place = np.array(
            [random.uniform(-1.5, 1.5), random.uniform(-29, -26), random.uniform(8.5, 11)]
        )
        forward = np.array([0.0, -0.8, 0.4]) - self.place
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, (0.0, 0.0, 1.0))
        right /= np.linalg.norm(right)
        self.axes = np.stack([right, -np.cross(right, forward), forward])
        self.focal = width * random.uniform(1.15, 1.3)

    def project(self, points: Any) -> tuple[Array, Array]:
        """Places in the picture (x, y in pixels; the centre of the first one is 0, 0) and pixels per metre there."""
        x, y, depth = self.axes @ (np.atleast_2d(points) - self.place).T
        scale = self.focal / depth
        width, height = self.size
        return np.stack([x * scale + width / 2 - 0.5, y * scale + height / 2 - 0.5], axis=1), scale


# --- What it looks like


class Painter:
    """Paints one game: a background that stays, and what moves before it."""

    def __init__(self, random: Random, camera: Camera, condition: Condition) -> None:
        self.random, self.camera, self.condition = random, camera, condition
        self.ball = self.lit(np.array(BALL) * condition.contrast + 90 * (1 - condition.contrast))
        self.shirts = [tuple(int(c) for c in random.integers(30, 250, 3)) for _ in range(2)]
        self.stage = self.paint_stage()

    def lit(self, colour: Any) -> Array:
        """A colour in this condition's light, which is bluer the less of it there is."""
        tint = np.array([1, 1, 1]) + (1 - self.condition.light) * np.array([-0.12, -0.04, 0.1])
        return np.asarray(np.asarray(colour, float) * self.condition.light * tint)

    def paint_stage(self) -> Array:
        """Crowd, advertising, court and lines, smoothed by drawing them twice as large."""
        width, height = self.camera.size
        picture = Image.new("RGB", (2 * width, 2 * height), (60, 62, 70))
        pen = ImageDraw.Draw(picture)
        inside, outside = COURTS[self.random.integers(len(COURTS))]
        self.paint_crowd(picture)
        self.polygon(pen, [(-30, 22), (30, 22), (14, -24), (-14, -24)], outside)
        self.paint_boards(pen)
        corners = [(-HALF_WIDTH, HALF_LENGTH), (HALF_WIDTH, HALF_LENGTH)]
        self.polygon(pen, corners + [(x, -y) for x, y in reversed(corners)], inside)
        self.paint_lines(pen)
        small = picture.filter(ImageFilter.GaussianBlur(0.8)).resize(
            (width, height), Image.Resampling.BOX
        )
        return self.lit(np.asarray(small, float))

    def paint_crowd(self, picture: Image.Image) -> None:
        """Heads and clothes above the back wall: small blots of any colour, some of the ball's."""
        pen = ImageDraw.Draw(picture)
        (_, horizon), _ = self.at((0, 22, 1.2))
        for _ in range(900):
            x, y = (
                self.random.uniform(0, picture.width),
                self.random.uniform(0, max(2.0, 2 * horizon)),
            )
            r = self.random.uniform(1.5, 5)
            colour = (
                BALL if self.random.random() < 0.03 else tuple(self.random.integers(20, 230, 3))
            )
            pen.ellipse((x - r, y - r, x + r, y + r), fill=tuple(int(c) for c in colour))

    def paint_boards(self, pen: ImageDraw.ImageDraw) -> None:
        """Advertising along the back wall: coloured boards with bright letters."""
        left = -24.0
        while left < 24:
            right = left + self.random.uniform(2, 5)
            ground = tuple(int(c) for c in self.random.integers(20, 120, 3))
            self.polygon(
                pen, [(left, 22, 0), (right, 22, 0), (right, 22, 1.2), (left, 22, 1.2)], ground
            )
            ink = tuple(int(c) for c in self.random.integers(150, 255, 3))
            for x in np.arange(left + 0.4, right - 0.4, 0.5):
                top = self.random.uniform(0.6, 0.9)
                self.polygon(
                    pen, [(x, 22, 0.3), (x + 0.25, 22, 0.3), (x + 0.25, 22, top), (x, 22, top)], ink
                )
            left = right + 0.1

    def paint_lines(self, pen: ImageDraw.ImageDraw) -> None:
        """The court's lines and the net."""
        single, white = HALF_WIDTH - 1.37, (235, 238, 235)
        lines = [
            ((x, -HALF_LENGTH), (x, HALF_LENGTH))
            for x in (-HALF_WIDTH, -single, single, HALF_WIDTH)
        ]
        lines += [((-HALF_WIDTH, y), (HALF_WIDTH, y)) for y in (-HALF_LENGTH, HALF_LENGTH)]
        lines += [((-single, y), (single, y)) for y in (-SERVICE, SERVICE)]
        lines += [((0, -SERVICE), (0, SERVICE))]
        for ends in lines:
            (a, b), scale = self.at(*ends)
            pen.line((*a, *b), fill=white, width=max(1, round(0.08 * scale.mean())))
        net = [(-HALF_WIDTH - 0.9, 0, 0), (HALF_WIDTH + 0.9, 0, 0)]
        top = [(HALF_WIDTH + 0.9, 0, NET_HEIGHT), (-HALF_WIDTH - 0.9, 0, NET_HEIGHT)]
        self.polygon(pen, net + top, (48, 52, 58))
        (a, b), _ = self.at(*top)
        pen.line((*a, *b), fill=white, width=3)

    def at(self, *points: tuple[float, ...]) -> tuple[Any, Array]:
        """Places in the picture twice as large; points without a height lie on the ground."""
        places, scale = self.camera.project([(*p, 0.0)[:3] for p in points])
        drawn = 2 * places + 0.5
        return (drawn if len(drawn) > 1 else drawn[0]), 2 * scale

    def polygon(self, pen: ImageDraw.ImageDraw, points: Any, colour: Any) -> None:
        """A filled polygon of places in metres."""
        places, _ = self.at(*points)
        pen.polygon([tuple(place) for place in places], fill=colour)

    def frame(self, moment: Moment, strays: Array) -> tuple[Image.Image, tuple[int, float, float]]:
        """One frame, and the visibility and place of its ball."""
        pixels = self.stage.copy()
        for stray in strays:
            self.blend(pixels, stray[None], self.ball)
        far, near = (moment.players[1], moment.players[0])
        behind = moment.path[:, 1].mean() > near[1]  # the ball is farther away than the near player
        self.shadow(pixels, moment.path)
        self.player(pixels, far, 1)
        seen = 0.0
        if behind:
            alpha = self.blend(pixels, moment.path, self.ball)
            covered = self.player(pixels, near, 0)
            seen = float((alpha * (1 - covered)).sum() / max(alpha.sum(), 1e-9))
        else:
            self.player(pixels, near, 0)
            alpha = self.blend(pixels, moment.path, self.ball)
            seen = 1.0
        label = self.label(alpha, moment.path, seen)
        pixels += self.random.normal(0, self.condition.noise, pixels.shape)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), label

    def label(self, alpha: Array, path: Array, seen: float) -> tuple[int, float, float]:
        """Where the ball is on average while the shutter is open, and how well it can be seen."""
        x, y = self.camera.project(path)[0].mean(axis=0)
        width, height = self.camera.size
        if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
            return ABSENT, 0.0, 0.0
        if seen < 0.4:
            return HIDDEN, x, y
        return (EASY if alpha.max() > 0.6 and seen > 0.9 else HARD), x, y

    def blend(
        self, pixels: Array, path: Array, colour: Array, radius: float = BALL_RADIUS
    ) -> Array:
        """Lay a ball over the picture, smeared along its path; returns how much it covers each pixel [h, w]."""
        places, scale = self.camera.project(path)
        dense = np.linspace(
            0, len(places) - 1, 4 * len(places) - 3
        )  # no gaps in a fast ball's trace
        steps = np.arange(len(places))
        trace = np.stack([np.interp(dense, steps, places[:, axis]) for axis in (0, 1)], axis=1)
        alpha = np.zeros(pixels.shape[:2])
        reach = radius * float(scale.max()) + 1
        (left, top), (right, bottom) = trace.min(axis=0) - reach, trace.max(axis=0) + reach
        rows = slice(max(0, int(top)), max(0, int(bottom) + 2))
        columns = slice(max(0, int(left)), max(0, int(right) + 2))
        y = np.arange(pixels.shape[0])[rows, None]
        x = np.arange(pixels.shape[1])[None, columns]
        for (cx, cy), size in zip(trace, np.interp(dense, steps, radius * scale), strict=True):
            alpha[rows, columns] += np.clip(size + 0.5 - np.hypot(x - cx, y - cy), 0, 1)
        alpha /= len(trace)
        pixels += alpha[..., None] * (colour - pixels)
        return alpha

    def shadow(self, pixels: Array, path: Array) -> None:
        """The ball's shadow on the ground, a little to the right."""
        ground = path + np.outer(path[:, 2], (0.35, 0.1, -1.0))
        column, row = self.camera.project(ground)[0].mean(axis=0).astype(int)
        height, width = pixels.shape[:2]
        under = pixels[np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)]
        self.blend(pixels, ground, under * 0.55, radius=0.8 * BALL_RADIUS)

    def player(self, pixels: Array, place: Array, number: int) -> Array:
        """A figure of ellipses with a racket and bright shoes; returns what it covers [h, w], 0 or 1."""
        (foot,), (scale,) = self.camera.project((*place, 0.0))
        left, top = int(foot[0] - scale), int(foot[1] - 2 * scale)
        right, bottom = int(foot[0] + scale) + 1, int(foot[1] + 0.2 * scale) + 1
        picture = Image.new("RGBA", (2 * (right - left), 2 * (bottom - top)))
        pen = ImageDraw.Draw(picture)

        def oval(dx: float, up: float, wide: float, tall: float, colour: Any) -> None:
            x, y = 2 * (foot[0] - left + dx * scale), 2 * (foot[1] - top - up * scale)
            w, h = 2 * wide * scale, 2 * tall * scale
            pen.ellipse((x - w, y - h, x + w, y + h), fill=(*colour, 255))

        oval(0.75, 1.15, 0.16, 0.22, (40, 40, 44))  # racket
        oval(-0.15, 0.4, 0.12, 0.42, (224, 180, 150))
        oval(0.15, 0.4, 0.12, 0.42, (224, 180, 150))
        oval(-0.17, 0.04, 0.13, 0.06, BALL)  # shoes of the ball's colour
        oval(0.17, 0.04, 0.13, 0.06, BALL)
        oval(0, 1.15, 0.3, 0.42, self.shirts[number])
        oval(0.4, 1.2, 0.3, 0.09, (224, 180, 150))
        oval(0, 1.72, 0.14, 0.17, (120, 84, 60))
        small = picture.resize((right - left, bottom - top), Image.Resampling.BOX)
        figure = Image.new("RGBA", pixels.shape[1::-1])
        figure.paste(small, (left, top))
        drawn = np.asarray(figure, float)
        cover = drawn[..., 3] / 255
        pixels += cover[..., None] * (self.lit(drawn[..., :3]) - pixels)
        return np.asarray((cover > 0.5).astype(float))


# --- Games, clips, files


def write_clip(directory: Path, painter: Painter, random: Random, frames: int, suffix: str) -> None:
    """Render one rally into a directory, labels last."""
    directory.mkdir(parents=True)
    rally = Rally(random, painter.condition)
    for _ in rally.moments(int(random.integers(0, 25))):
        pass  # clips begin anywhere in a rally
    beside = random.choice((-1, 1), painter.condition.strays) * random.uniform(
        4.5, 8, painter.condition.strays
    )
    along = random.uniform(-HALF_LENGTH, HALF_LENGTH + 4, painter.condition.strays)
    strays = np.stack([beside, along, np.full(painter.condition.strays, BALL_RADIUS)], axis=1)
    rows = []
    for at, moment in enumerate(rally.moments(frames)):
        picture, (visibility, x, y) = painter.frame(moment, strays)
        name = f"{at:04}{suffix}"
        picture.save(directory / name, **({"quality": 92} if suffix == ".jpg" else {}))
        place = ("", "", "") if visibility == ABSENT else (f"{x:.1f}", f"{y:.1f}", moment.status)
        rows.append((name, visibility, *place))
    with open(directory / "Label.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("file name", "visibility", "x-coordinate", "y-coordinate", "status"))
        writer.writerows(rows)


def write_games(
    output: Path,
    *,
    games: int,
    clips: int,
    frames: int,
    size: tuple[int, int] = (320, 180),
    condition: str = "day",
    first_game: int = 1,
    suffix: str = ".jpg",
    seed: int = 0,
    quiet: bool = False,
) -> None:
    """Write `games` directories with `clips` clips of `frames` frames each; the same arguments, the same bytes.

    A game's looks follow from `seed` and its number, so that another condition shows the same court in
    another light.
    """
    for game in range(first_game, first_game + games):
        looks = np.random.default_rng([seed, game, 0])
        painter = Painter(looks, Camera(looks, *size), CONDITIONS[condition])
        for clip in range(1, clips + 1):
            random = np.random.default_rng([seed, game, clip, sorted(CONDITIONS).index(condition)])
            painter.random = random
            write_clip(output / f"game{game}" / f"Clip{clip}", painter, random, frames, suffix)
            if not quiet:
                show_progress((game - first_game) * clips + clip, games * clips)


def show_progress(done: int, total: int, width: int = 40) -> None:
    """A bar on standard error."""
    filled = round(width * done / total)
    end = "\n" if done == total else ""
    print(
        f"\r{'█' * filled}{'░' * (width - filled)} clip {done} of {total}",
        end=end,
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    """Read the options and write the clips."""
    text = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--output", type=Path, required=True, help="directory to make")
    parser.add_argument("--condition", choices=sorted(CONDITIONS), default="day")
    parser.add_argument(
        "--games", type=int, default=5, help="courts with their own looks (default: 5)"
    )
    parser.add_argument(
        "--first-game", type=int, default=1, help="number of the first (default: 1)"
    )
    parser.add_argument("--clips", type=int, default=8, help="rallies of each game (default: 8)")
    parser.add_argument("--frames", type=int, default=60, help="frames of each clip (default: 60)")
    parser.add_argument(
        "--size", default="320x180", help="WIDTHxHEIGHT in pixels (default: 320x180)"
    )
    parser.add_argument("--png", action="store_true", help="write PNG instead of JPEG files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output} exists already")
    width, height = (int(side) for side in options.size.split("x"))
    write_games(
        options.output,
        games=options.games,
        clips=options.clips,
        frames=options.frames,
        size=(width, height),
        condition=options.condition,
        first_game=options.first_game,
        suffix=".png" if options.png else ".jpg",
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
