"""`make setup` where it cannot work: one sentence that says what to do, and nothing left behind."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOO_OLD = "#!/bin/sh\nexit 1\n"
NO_VENV = """#!/bin/sh
case "$*" in *sys.exit*) exit 0;; --version) echo Python 3.12.0;; *) exit 1;; esac
"""


@pytest.mark.parametrize(
    ("python", "message"),
    [(TOO_OLD, "needs Python 3.11 or newer"), (NO_VENV, "can make no virtual environment")],
)
def test_a_python_that_cannot_do_is_explained(tmp_path, python, message):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("make", "sh", "rm", "touch", "echo"):
        if found := shutil.which(name):
            (programs / name).symlink_to(found)
    (programs / "python3").write_text(python)
    (programs / "python3").chmod(0o755)
    result = subprocess.run(
        ["make", "setup"], cwd=tmp_path, env={**os.environ, "PATH": str(programs), "MAKEFLAGS": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert message in result.stderr
    assert "make setup PYTHON=" in result.stderr
    assert not (tmp_path / ".venv").exists()
