"""`<output>.partial`: where an unfinished training keeps its state, and how it is told from other directories.

What lies there is removed when the training ends. So a training marks the directory as it makes it, takes
over one with the mark and with nothing but what trainings put there, and removes only that.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qlx.checkpoint import check_apart, check_output, held, is_checkpoint, load_json
from qlx.errors import UsageError
from qlx.recipe import Recipe
from qlx.training.progress import METRICS_FILE
from qlx.training.state import TRAINER_STATE_FILE

__all__ = ["OFFLOADED", "STATE", "check_places", "interrupted_at", "work_directory", "working"]

STATE = "state"
OFFLOADED = "offloaded"
_MARK = ".qlx-training"
_SAID = "qlx train keeps the state of an unfinished training here; it removes it when it is done.\n"
_OWN = re.compile(
    rf"{re.escape(_MARK)}|{STATE}|{OFFLOADED}|{re.escape(METRICS_FILE)}|tokenizer|tokenizer\.json"
    rf"|\.qlx-{STATE}-\w{{8}}|\.{STATE}\.qlx-old-\w{{8}}"  # what a kill left of a state being replaced
)


def check_places(
    recipe: Recipe, output: Path, inputs: Iterable[Path] = (), *, force: bool = False
) -> None:
    """Check, before any work, that a training may write to `output` and keep its state beside it.

    `inputs` are read besides what the recipe names, such as the recipe's own file.

    Raises:
        UsageError: see `check_output`; or what lies in the state's place is no training's.
    """
    read = (recipe.base.path, recipe.data.path, recipe.data.chat_template, *inputs)
    check_output(output, read, force=force)
    work = work_directory(output)
    check_apart(work, read)
    found = _foreign(work)
    if found is not None:
        raise UsageError(
            f"{work}: this training would keep its state there, but it {found}, which no training made; "
            "move it, or choose another --output"
        )


def work_directory(output: Path) -> Path:
    """The directory beside a run where its training keeps its state."""
    return output.with_name(output.name + ".partial")


def _foreign(work: Path) -> str | None:
    """What at the place of a work directory was not made by a training; None if nothing there."""
    if work.is_symlink() or not work.is_dir():
        return "is a link" if work.is_symlink() else "is a file" if work.exists() else None
    names = sorted(os.listdir(work))
    if names and not (work / _MARK).is_file():
        return f"holds {names[0]}"
    return next((f"holds {name}" for name in names if not _is_own(work / name)), None)


def _is_own(entry: Path) -> bool:
    return _OWN.fullmatch(entry.name) is not None and not entry.is_symlink()


@contextmanager
def working(output: Path, *, resume: bool, force: bool) -> Iterator[Path]:
    """The work directory of a training, to be asked for after `check_places`.

    Removed on success, and when what ended the training left no state to go on from.

    Raises:
        UsageError: there is nothing to resume, or an interrupted training would be lost, or another
            training works there.
    """
    work = work_directory(output)
    if resume and not work.is_dir():
        raise UsageError(
            f"{work}: there is no interrupted training to resume; start it without --resume"
        )
    if work.exists() and not resume:
        if is_checkpoint(work / STATE) and not force:
            raise UsageError(
                f"{work}: holds an interrupted training; go on with --resume, or start anew with --force"
            )
        with held(work):
            _remove(work)
    work.mkdir(parents=True, exist_ok=True)
    with held(work):
        try:
            (work / _MARK).write_text(_SAID, "utf-8")
            yield work
        except BaseException:
            if not is_checkpoint(work / STATE):
                _remove(work)
            raise
        _remove(work)


def _remove(work: Path) -> None:
    """Remove what trainings put there, the mark last, and the directory unless there is more in it."""
    own = filter(_is_own, work.iterdir())
    for entry in sorted(own, key=lambda entry: entry.name == _MARK):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    with suppress(OSError):
        work.rmdir()


def interrupted_at(output: Path) -> tuple[Path, int] | None:
    """Where the state of an unfinished training of `output` lies, and its step; None if there is none."""
    work = work_directory(Path(output))
    if not is_checkpoint(work / STATE):
        return None
    return work, int(load_json(work / STATE / TRAINER_STATE_FILE)["global_step"])
