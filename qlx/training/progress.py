"""What a person sees while a model trains, and the metrics file that stays: loss, rate, time left."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlx.errors import require

__all__ = ["METRICS_FILE", "Reporter", "metrics_callback", "progress_callback", "read_metrics"]

METRICS_FILE = "metrics.jsonl"

Reporter = Callable[[str], None]


def read_metrics(path: Path, up_to: int | None = None) -> list[dict[str, float]]:
    """The lines of a metrics file: step, epoch, loss, lr, seconds; those after step `up_to` left out.

    A last line that a kill cut short is left out too.
    """
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if up_to is None or row["step"] <= up_to:
            rows.append(row)
    return rows


def metrics_callback(path: Path, *, resumed_at: int | None) -> Any:
    """A trainer callback that appends a line per log step to `metrics.jsonl`.

    `resumed_at` is the step a resumed training goes on from; later lines of the file are dropped and
    its seconds continue.
    """
    transformers = require("transformers", "train")
    kept = read_metrics(path, resumed_at) if resumed_at is not None else []
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
    offset = kept[-1]["seconds"] if kept else 0.0

    class Metrics(transformers.TrainerCallback):  # type: ignore[name-defined,misc]
        started = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.started = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not logs or "loss" not in logs:
                return
            row = {
                "step": state.global_step,
                "epoch": round(float(state.epoch or 0), 6),
                "loss": float(logs["loss"]),
                "lr": float(logs["learning_rate"]),
                "seconds": round(offset + time.monotonic() - self.started, 3),
            }
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    return Metrics()


def progress_callback(report: Reporter) -> Any:
    """A trainer callback that reports loss, learning rate, speed and time left about twenty times."""
    transformers = require("transformers", "train")

    class Lines(transformers.TrainerCallback):  # type: ignore[name-defined,misc]
        started = 0.0
        first = 0
        shown = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.started, self.first = time.monotonic(), state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if not logs or "loss" not in logs:
                return
            done = state.global_step - self.first
            if (
                state.global_step < state.max_steps
                and state.global_step - self.shown < state.max_steps / 20
            ):
                return
            self.shown = state.global_step
            rate = max(done, 1) / max(time.monotonic() - self.started, 1e-9)
            report(
                f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  "
                f"lr {logs['learning_rate']:.2e}  {rate:.1f} steps/s  "
                f"{_clock((state.max_steps - state.global_step) / rate)} left"
            )

    return Lines()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
