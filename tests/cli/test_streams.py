"""Standard streams that are closed, full, unread or ASCII: what is printed, and how the program ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QLX = (sys.executable, "-m", "qlx")
FITS = ("plan", "--params", "1B")
FITS_NOT = ("plan", "--params", "70B", "--vram", "1GB")  # a check that fails: exit code 1
HELP = ("merge", "--help")


def ended(words, redirection, **variables):
    """(exit code, standard error) of a call whose streams the shell redirects."""
    line = f'"$@" {redirection}'
    result = subprocess.run(
        ["bash", "-c", line, "bash", *QLX, *words],
        capture_output=True, text=True, env={**os.environ, **variables}, check=False,
    )  # fmt: skip
    return result.returncode, result.stderr


@pytest.mark.parametrize("flags", [(), ("--json",)])
@pytest.mark.parametrize(
    ("redirection", "code", "says"),
    [
        (">/dev/full", 5, "qlx: standard output: no room for the result; what was made is there\n"),
        (">&-", 141, "qlx: standard output: closed; the result could not be printed\n"),
        ("> >(exec <&-; sleep 1)", 141, ""),
    ],
)
def test_a_result_that_cannot_be_printed_has_a_code_of_its_own(redirection, code, says, flags):
    wait = "sleep 0.2; " if "sleep" in redirection else ""
    line = f"exec {redirection}; {wait}" + '"$@"'
    for words, expected in ((FITS, (code, says)), (FITS_NOT, (1, ""))):
        result = subprocess.run(
            ["bash", "-c", line, "bash", *QLX, *words, *flags],
            stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        assert (result.returncode, result.stderr) == expected


@pytest.mark.parametrize(
    ("redirection", "code"), [(">/dev/full", 5), ("| true; exit ${PIPESTATUS[0]}", 141)]
)
def test_so_has_a_help_text(redirection, code):
    got, said = ended(HELP, redirection)
    assert got == code
    assert "Traceback" not in said
    assert "Exception" not in said


def test_a_refusal_stays_one_wherever_it_is_printed():
    for redirection in (">/dev/full", ">&-", "2>/dev/full", "2>&-", ">&- 2>&- <&-"):
        assert ended(("inspect", "/", "--json"), redirection)[0] == 3
        assert ended(("frobnicate",), redirection)[0] == 2


def test_progress_that_cannot_be_printed_stops_nothing(adapter):
    """What a library prints goes the same way."""
    for redirection in ("2>/dev/full", "2>&-", "2>&1 >/dev/null"):
        assert ended(("inspect", str(adapter)), redirection)[0] == 0


@pytest.mark.parametrize(
    "variables", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}]
)
def test_other_encodings_get_escapes(tmp_path, plain_model, variables):
    directory = plain_model.rename(tmp_path / "модель")
    for flags in ((), ("--json",)):
        result = subprocess.run(
            [*QLX, "inspect", directory, *flags],
            capture_output=True, env={**os.environ, **variables}, check=False,
        )  # fmt: skip
        assert (result.returncode, result.stderr) == (0, b"")
        assert result.stdout.isascii()
        assert b"\\u043c" in result.stdout
    assert json.loads(result.stdout)["path"] == str(directory)


@pytest.mark.parametrize(
    "words",
    [
        ("verify", "PATH"),
        ("verify", "GONE"),
        ("inspect", "PATH"),
        ("inspect", "relative"),
        ("pack", "fine", "-o", "PATH", "--to", "nf4"),
        ("load-adapter", "--base", "PATH", "--adapter", "fine"),
        ("train", "RECIPE", "--set", "name=\udcff"),
    ],
)
def test_what_is_not_utf8_is_refused_by_name(tmp_path, adapter, words):
    """And printed, also as JSON, which a byte that is not UTF-8 would spoil."""
    strange = os.fsdecode(os.fsencode(tmp_path / "odd-") + b"\xff")
    os.mkdir(strange)
    adapter.rename(f"{strange}/relative")
    (tmp_path / "fine").mkdir()
    (tmp_path / "recipe").write_text("x")
    places = {
        "PATH": strange,
        "GONE": strange + "x",
        "fine": tmp_path / "fine",
        "RECIPE": tmp_path / "recipe",
    }
    result = subprocess.run(
        [*QLX, *(places.get(word, word) for word in words), "--json"],
        capture_output=True, cwd=strange, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    message = json.loads(result.stdout)["error"]["message"]
    assert "does not exist" in message if "GONE" in words else "\\udcff" in message
    assert len(result.stderr.splitlines()) == 1
