"""Directories appear whole or not at all; a kill at any instant leaves the old state or the new one."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlx.checkpoint import Manifest, durable, new_checkpoint, open_checkpoint, replace_file, seal
from qlx.errors import CorruptCheckpoint, NoRoom, UsageError


def leftovers(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(".qlx-")]


def test_clean_exit_makes_the_directory_with_usual_modes(tmp_path: Path) -> None:
    with new_checkpoint(tmp_path / "deep" / "new") as staging:
        (staging / "f").write_text("x")
        assert not (tmp_path / "deep" / "new").exists()
    assert (tmp_path / "deep" / "new" / "f").read_text() == "x"
    assert (tmp_path / "deep" / "new").stat().st_mode & 0o777 == 0o755
    assert leftovers(tmp_path / "deep") == []


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_any_error_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), new_checkpoint(tmp_path / "new") as staging:
        (staging / "f").write_text("x")
        raise error
    assert os.listdir(tmp_path) == []


def test_full_disk_is_no_room(tmp_path: Path) -> None:
    with pytest.raises(NoRoom, match="disk is full"), new_checkpoint(tmp_path / "new"):
        raise OSError(errno.ENOSPC, "no space")
    assert os.listdir(tmp_path) == []


def test_existing_directories_are_kept_without_force_and_exchanged_with_it(tmp_path: Path) -> None:
    target = make(tmp_path / "t", "old")
    with pytest.raises(UsageError, match="--force"), new_checkpoint(target):
        pass
    with new_checkpoint(target, force=True) as staging:
        write(staging, "new")
        assert open_checkpoint(target).manifest.tag == "old"
    assert open_checkpoint(target).manifest.tag == "new"
    assert leftovers(tmp_path) == []


def write(directory: Path, tag: str) -> None:
    (directory / "file").write_text(tag)
    seal(directory, Manifest(kind="run", task="causal-lm", tag=tag))


def make(target: Path, tag: str) -> Path:
    with new_checkpoint(target) as staging:
        write(staging, tag)
    return target


def test_what_was_put_there_during_the_work_is_not_replaced(tmp_path: Path) -> None:
    for target, kept in (
        (make(tmp_path / "there", "old"), "notes"),
        (tmp_path / "not-yet", "thesis"),
    ):
        with (
            pytest.raises(UsageError, match=rf"{kept}|not a qlx checkpoint"),
            new_checkpoint(target, force=True) as staging,
        ):
            write(staging, "new")
            target.mkdir(exist_ok=True)
            (target / kept).write_text("mine")
        assert (target / kept).read_text() == "mine"
    assert leftovers(tmp_path) == []


def test_force_never_replaces_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for name in ("home", "file", "link"):
        with pytest.raises(UsageError), new_checkpoint(tmp_path / name, force=True):
            pass
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years"


WRITER = """
import sys, time, pathlib
from qlx.checkpoint import Manifest, new_checkpoint, seal
target = pathlib.Path(sys.argv[1])
for round in range(200):
    with new_checkpoint(target, force=True) as staging:
        for name in ("a", "b"):
            (staging / name).write_text(str(round))
        seal(staging, Manifest(kind="run", task="causal-lm", tag=str(round)))
    print(round, flush=True)
"""


def test_a_kill_at_any_instant_leaves_one_whole_state(tmp_path: Path) -> None:
    target = tmp_path / "t"
    for delay in (0.0, 0.003, 0.007, 0.013, 0.021):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        contents = {(target / name).read_text() for name in ("a", "b")}
        assert contents == {open_checkpoint(target).manifest.tag}


def test_replace_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    replace_file(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"
    assert leftovers(tmp_path) == []


KILLED = """
import os, pathlib, signal, sys
from qlx.checkpoint import new_checkpoint
with new_checkpoint(pathlib.Path(sys.argv[1])) as staging:
    (staging / "half").write_text("x")
    print(flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_kill_left_is_removed_by_the_next_writer_of_that_name(tmp_path: Path) -> None:
    """Not while its writer lives, not by a writer of another name, nor what only looks like it."""
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "new")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        (staging,) = leftovers(tmp_path)
        with new_checkpoint(tmp_path / "new"):
            assert len(leftovers(tmp_path)) == 2
        os.rmdir(tmp_path / "new")
        assert leftovers(tmp_path) == [staging]
    assert leftovers(tmp_path) == [staging]
    for other in ("ne", "new-x"):
        replace_file(tmp_path / other, b"")
    (tmp_path / ".qlx-new-of-mine").mkdir()
    assert sorted(leftovers(tmp_path)) == sorted([staging, ".qlx-new-of-mine"])
    with new_checkpoint(tmp_path / "new"):
        pass
    assert leftovers(tmp_path) == [".qlx-new-of-mine"]


def test_errors_name_the_target_and_not_the_staging_directory(tmp_path: Path) -> None:
    with (
        pytest.raises(CorruptCheckpoint, match=f"^{tmp_path}/new/x: broken$"),
        new_checkpoint(tmp_path / "new") as staging,
    ):
        raise CorruptCheckpoint(f"{staging / 'x'}: broken")
    with pytest.raises(OSError) as caught, new_checkpoint(tmp_path / "new") as staging:
        (staging / "missing").read_bytes()
    assert caught.value.filename == str(tmp_path / "new" / "missing")


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    for write in (new_checkpoint, lambda path: contextlib.nullcontext(replace_file(path, b""))):
        with (
            pytest.raises(UsageError, match="cannot be written in /proc") as caught,
            write(Path("/proc/new")),
        ):
            pass
        assert ".qlx-" not in str(caught.value)


def test_a_file_is_written_through_links_and_into_devices(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    replace_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    replace_file(Path(os.devnull), b"new")
    assert Path(os.devnull).is_char_device()


def test_what_cannot_take_the_old_ones_place_leaves_it_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system without an exchange of two directories in one step."""
    old, staging = tmp_path / "target", tmp_path / "staging"
    for directory in (old, staging):
        directory.mkdir()
        (directory / "name").write_text(directory.name)
    monkeypatch.setattr(durable.ctypes, "CDLL", lambda *_, **__: object())
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if source == staging:
            raise OSError(errno.ENOSPC, "no space")
        rename(source, target)

    monkeypatch.setattr(durable.os, "rename", failing)
    with pytest.raises(OSError, match="no space"):
        durable._exchange(staging, old)
    assert (old / "name").read_text() == "target"
    monkeypatch.setattr(durable.os, "rename", rename)
    durable._exchange(staging, old)
    assert (old / "name").read_text() == "staging"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["target"]
