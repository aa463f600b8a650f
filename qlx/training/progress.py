"""What a person sees while a model trains, and the metrics file that stays: loss, rate, time left, memory."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qlx.errors import require
from qlx.recipe import TrainingSection

__all__ = [
    "EVALUATED",
    "METRICS_FILE",
    "Reporter",
    "check_reporting",
    "memory",
    "metrics_callback",
    "progress_callback",
    "read_metrics",
    "reporting_callbacks",
]

METRICS_FILE = "metrics.jsonl"
EVALUATED = "eval_"
"""How the names of held-out scores begin."""

Reporter = Callable[[str], None]


def read_metrics(path: Path, up_to: int | None = None) -> list[dict[str, float]]:
    """The lines of a metrics file, those after step `up_to` left out.

    A line of training holds step, epoch, loss, lr, grad_norm, seconds and memory; one of an evaluation the
    held-out scores (`eval_…`) in place of loss, lr and grad_norm. A last line that a kill cut short is left out too.
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


def metrics_callback(
    path: Path, *, resumed_at: int | None, start: dict[str, float] | None = None
) -> Any:
    """A trainer callback that appends a line per log step, or per evaluation, to `metrics.jsonl`.

    `resumed_at` is the step a resumed training goes on from; later lines of the file are dropped and
    its seconds continue. `start` are the held-out scores from before the first step.
    """
    transformers = require("transformers", "train")
    kept = read_metrics(path, resumed_at) if resumed_at is not None else []
    if not kept and start is not None:
        kept = [{"step": 0, "epoch": 0.0, **start, "seconds": 0.0}]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept), "utf-8")
    offset = kept[-1]["seconds"] if kept else 0.0

    class Metrics(transformers.TrainerCallback):  # type: ignore[name-defined,misc]
        started = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.started = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            found = _logged(logs or {})
            if not found:
                return
            row = {
                "step": state.global_step,
                "epoch": round(float(state.epoch or 0), 6),
                **found,
                "seconds": round(offset + time.monotonic() - self.started, 3),
                **memory(),
            }
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    return Metrics()


def _logged(logs: Mapping[str, float]) -> dict[str, float]:
    """What a metrics line says of a log step, or of an evaluation; nothing of other logs."""
    if "loss" in logs:
        return {
            "loss": float(logs["loss"]),
            "lr": float(logs["learning_rate"]),
            "grad_norm": float(logs["grad_norm"]),
        }
    return {name: float(value) for name, value in logs.items() if name.startswith(EVALUATED)}


def memory() -> dict[str, int]:
    """Bytes that this process holds: resident ones, or the peaks on the GPU where it trains there."""
    import torch

    if torch.cuda.is_available():
        return {
            "memory_allocated": torch.cuda.max_memory_allocated(),
            "memory_reserved": torch.cuda.max_memory_reserved(),
        }
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    return {"memory_resident": pages * os.sysconf("SC_PAGE_SIZE")}


def progress_callback(report: Reporter) -> Any:
    """A trainer callback that reports loss, learning rate, speed, time left and memory about twenty times."""
    transformers = require("transformers", "train")

    class Lines(transformers.TrainerCallback):  # type: ignore[name-defined,misc]
        started = 0.0
        first = 0
        shown = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.started, self.first = time.monotonic(), state.global_step

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            found, step, last = _logged(logs or {}), state.global_step, state.max_steps
            if "loss" in found and (step >= last or step - self.shown >= last / 20):
                self.shown = step
                rate = max(step - self.first, 1) / max(time.monotonic() - self.started, 1e-9)
                report(
                    f"step {step}/{last}  loss {found['loss']:.4f}  lr {found['lr']:.2e}  "
                    f"{rate:.1f} steps/s  {_clock((last - step) / rate)} left  {_memory_text()}"
                )
            elif found and "loss" not in found:
                scores = (
                    f"{name.removeprefix(EVALUATED)} {value:.4f}" for name, value in found.items()
                )
                report(f"step {step}/{last}  held out: {', '.join(scores)}")

    return Lines()


def reporting_callbacks(section: TrainingSection, output: Path) -> list[Any]:
    """Transformers' callbacks for TensorBoard and Weights & Biases, as a recipe asks for them.

    TensorBoard's files go to `<output>-tensorboard`, into a directory of their own with each call. Nothing is
    sent to Weights & Biases unless the environment says so (WANDB_MODE=online): its files go to `<output>-wandb`.

    Raises:
        MissingExtra: what writes them is not installed.
    """
    check_reporting(section)
    integrations = require("transformers.integrations", "train")
    callbacks = []
    if "tensorboard" in section.report_to:
        writers = require("torch.utils.tensorboard", "tensorboard")
        started = time.strftime("%Y-%m-%dT%H-%M-%S")
        writer = writers.SummaryWriter(log_dir=str(_beside(output, "tensorboard") / started))
        callbacks.append(integrations.TensorBoardCallback(writer))
    if "wandb" in section.report_to:
        place = _beside(output, "wandb")
        place.mkdir(parents=True, exist_ok=True)
        for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(place)}.items():
            os.environ.setdefault(name, value)
        callbacks.append(integrations.WandbCallback())
    return callbacks


def check_reporting(section: TrainingSection) -> None:
    """Check that what a recipe reports to is installed.

    Raises:
        MissingExtra: it is not.
    """
    for name in section.report_to:
        require(name, name)


def _beside(output: Path, what: str) -> Path:
    return output.with_name(f"{output.name}-{what}")


def _memory_text() -> str:
    """The memory that this process holds, with what of it that is."""
    held = {name.removeprefix("memory_"): size / 1e9 for name, size in memory().items()}
    return ", ".join(f"{size:.2f} GB {name}" for name, size in held.items())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
