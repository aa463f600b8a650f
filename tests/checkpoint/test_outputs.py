"""Outputs never go into or over an input, nor into any checkpoint."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qlx.checkpoint import (
    BaseRef,
    Manifest,
    check_file,
    check_output,
    new_checkpoint,
    open_checkpoint,
    seal,
)
from qlx.errors import UsageError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """An adapter that records `base`, a directory relative to here."""
    manifest = Manifest(
        kind="run",
        task="causal-lm",
        tag="x",
        base=BaseRef(name="base", fingerprint="sha256:" + "a" * 64),
    )
    with new_checkpoint(tmp_path / "made") as staging:
        (staging / "weights").write_text("x")
        seal(staging, manifest)
    return tmp_path / "made"


@pytest.mark.parametrize("place", ["inner", "deep/er/inner", "../link/inner", "../link/deep/inner"])
def test_nothing_is_written_inside_a_checkpoint(checkpoint: Path, place: str) -> None:
    checkpoint.with_name("link").symlink_to(checkpoint)
    with (
        pytest.raises(UsageError, match="lies inside the checkpoint"),
        new_checkpoint(checkpoint / place),
    ):
        raise AssertionError("work was begun")
    with pytest.raises(UsageError, match=r"lies inside the checkpoint|no directory"):
        check_file(checkpoint / place)
    open_checkpoint(checkpoint)


def test_an_output_may_not_be_hold_or_lie_inside_an_input(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, link = tmp_path / "plain", tmp_path / "link"
    plain.mkdir()
    link.symlink_to(checkpoint)
    for output, given, says in (
        (checkpoint, checkpoint, "is the input"),
        (checkpoint, link, "is the input"),
        (link, checkpoint, "is the input"),
        (plain, plain, "is the input"),
        (plain / "inner", plain, "inside the input"),
        (tmp_path, plain, "holds the input"),
    ):
        with pytest.raises(UsageError, match=says):
            check_output(output, [None, "owner/model", given], force=True)
    assert check_output(checkpoint, ["owner/model", plain], force=True) == checkpoint
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is the input base"):
        check_output(Path("base"), [checkpoint], force=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: (path / "notes.txt").write_text("mine"), r"holds notes\.txt"),
        (lambda path: (path / "thesis").mkdir(), "holds thesis"),
        (lambda path: (path / "weights").unlink() or (path / "weights").mkdir(), "holds weights"),
        (lambda path: (path / "qlx.json").write_text("{}"), r"qlx\.json is not as this qlx writes"),
        (lambda path: (path / "weights").write_text("damaged"), None),
        (lambda path: (path / "weights").unlink(), None),
    ],
)
def test_force_replaces_only_what_qlx_wrote(
    checkpoint: Path, change: Callable[[Path], object], says: str | None
) -> None:
    change(checkpoint)
    if says is None:
        assert check_output(checkpoint, force=True) == checkpoint
    else:
        with pytest.raises(UsageError, match=f"^{checkpoint}: .*{says}"):
            check_output(checkpoint, force=True)


def test_a_report_does_not_go_among_the_files_of_a_model_or_into_an_input(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the model is to this call; `base` is what the checkpoint records."""
    (tmp_path / "base" / "deep").mkdir(parents=True)
    for mark in ("config.json", "adapter_config.json", "model-00001-of-00002.safetensors"):
        model = tmp_path / mark.partition(".")[0]
        model.mkdir()
        (model / mark).write_text("x")
        (tmp_path / f"link-{mark}").symlink_to(model / mark)
        for report in (model / mark, model / "new", tmp_path / f"link-{mark}"):
            with pytest.raises(UsageError, match="among the files of a model"):
                check_file(report)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="inside the input base"):
        check_file(Path("base/deep/report"), [checkpoint])


def test_a_place_that_cannot_be_written_is_named_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file is not a directory"):
        check_output(tmp_path / "file" / "new")
    with closed_directory() as closed:
        for check in (check_output, check_file):
            with pytest.raises(UsageError, match=f"{closed} is not writable"):
                check(closed / "new")


@contextlib.contextmanager
def closed_directory() -> Iterator[Path]:
    """A directory that this process may only read, even where the tests run as root."""
    nobody, me = 65534, os.geteuid()
    with tempfile.TemporaryDirectory() as closed:
        Path(closed).chmod(0o555)
        os.seteuid(me or nobody)
        try:
            yield Path(closed)
        finally:
            os.seteuid(me)


def test_files_to_write(tmp_path: Path) -> None:
    (tmp_path / "recipe").write_text("x")
    check_file(tmp_path / "new")
    check_file(tmp_path / "recipe")
    check_file(Path(os.devnull))
    for path, says in (
        (tmp_path / "recipe", "another use"),
        (tmp_path / "missing" / "new", "no directory"),
        (tmp_path, "is a directory"),
    ):
        with pytest.raises(UsageError, match=says):
            check_file(path, [None, tmp_path / "recipe"])
