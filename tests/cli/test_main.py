"""The contract of every command: what starts fast, streams, exit codes, errors as one line."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

from qlx import errors
from qlx.cli import commands, main, options
from qlx.cli.commands import MODULES, program

ROOT = Path(__file__).parents[2]
HEAVY = {
    "accelerate", "bitsandbytes", "datasets", "matplotlib", "onnx", "onnxruntime", "peft", "sklearn",
    "torch", "transformers", "trl",
}  # fmt: skip


def loaded_by(*arguments):
    """Names of the top-level modules that a call of the program has loaded when it ends."""
    code = (
        "import sys; from qlx.cli import main; code = main(sys.argv[1:]); "
        "print(*{n.split('.')[0] for n in sys.modules}, file=sys.stderr); sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    return result.returncode, set(result.stderr.split())


def processor_seconds(*command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# --- Starting


def test_help_starts_within_150_ms_of_bare_python():
    bare = min(processor_seconds(sys.executable, "-c", "pass") for _ in range(5))
    helped = min(processor_seconds(sys.executable, "-m", "qlx", "--help") for _ in range(5))
    assert helped - bare < 0.15


def test_help_loads_click_and_nothing_heavy():
    code, modules = loaded_by("--help")
    assert code == 0
    assert "click" in modules
    assert modules & {*HEAVY, "numpy", "pydantic", "rich", "yaml", "safetensors"} == set()


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_inspect_loads_nothing_heavy(plain_model, flags):
    code, modules = loaded_by("inspect", str(plain_model), *flags)
    assert code == 0
    assert modules & HEAVY == set()


def test_the_installed_program_answers():
    result = subprocess.run(
        [Path(sys.executable).with_name("qlx"), "--version"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout.startswith("qlx, version 0.")


def test_no_arguments_show_the_commands(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in MODULES)


# --- Help


@pytest.mark.parametrize("name", MODULES)
def test_each_command_has_help_with_an_example_that_parses(name, capsys):
    assert main([name, "--help"]) == 0
    captured = capsys.readouterr()
    assert "Example" in captured.out
    assert f"  qlx {name}" in captured.out
    assert captured.err == ""
    command = program.get_command(click.Context(program), name)
    assert isinstance(command, options.Command)
    for option in ("--json", "--quiet", "--debug"):
        assert option in captured.out


@pytest.mark.parametrize("name", MODULES)
def test_examples_name_options_that_exist(name):
    import shlex

    command = program.get_command(click.Context(program), name)
    assert command.examples
    for example in command.examples:
        words = shlex.split(example)
        assert words[:2] == ["qlx", name]
        command.make_parser(click.Context(command)).parse_args(words[2:])


# --- Failing


@pytest.fixture
def failing(monkeypatch, tmp_path):
    """A real command, `qlx boom`, that prints and then raises what it is told to."""

    def install(error):
        @options.command("boom", examples=("qlx boom",))
        def command(session):
            print("chatter of a library")
            session.report("working")
            raise error

        module = type(sys)("boom_command")
        module.command = command
        monkeypatch.setitem(sys.modules, "boom_command", module)
        monkeypatch.setitem(commands.MODULES, "boom", "boom_command")

    return install


def no_module(name):
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


CASES = [
    (errors.CheckFailed("outputs differ"), 1, "outputs differ"),
    (errors.UsageError("output exists"), 2, "output exists"),
    (click.UsageError("no such thing"), 2, "no such thing; see `qlx"),
    (errors.Mismatch("another base"), 3, "another base"),
    (FileNotFoundError(errno.ENOENT, "No such file", "x.json"), 3, "x.json: No such file"),
    (PermissionError(errno.EACCES, "Permission denied", "x"), 3, "x: Permission denied"),
    (errors.MissingExtra("peft is not installed"), 4, "peft is not installed"),
    (no_module("torch.nn"), 4, "pip install 'qlx[train]'"),
    (no_module("onnxruntime"), 4, "pip install 'qlx[serve]'"),
    (errors.NoRoom("disk full"), 5, "disk full"),
    (OSError(errno.ENOSPC, "No space left on device", "out"), 5, "out: No space left"),
    (MemoryError(), 5, "not enough memory"),
    (RuntimeError("[enforce fail at DefaultCPUAllocator.cpp] can't allocate"), 5, "not enough memory"),
    (no_module("qlx.nonsense"), 70, "internal error: ModuleNotFoundError"),
    (RuntimeError("surprise\nwith lines"), 70, "internal error: RuntimeError: surprise with lines"),
    (KeyboardInterrupt(), 130, "interrupted"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "code", "text"), CASES, ids=lambda value: repr(value)[:30])
def test_every_failure_is_one_line_and_one_code(failing, capsys, error, code, text):
    failing(error)
    assert main(["boom", "--quiet"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("qlx: ")
    assert text in last
    assert "Traceback" not in captured.err
    assert "working" not in captured.err


@pytest.mark.parametrize(("extra", "named"), [("export", "export"), ("train", "serve")])
def test_a_missing_module_names_the_extra_of_the_command(monkeypatch, capsys, extra, named):
    @options.command("boom", examples=("qlx boom",), extra=extra)
    def command(session):
        raise no_module("onnxruntime")

    module = type(sys)("boom_command")
    module.command = command
    monkeypatch.setitem(sys.modules, "boom_command", module)
    monkeypatch.setitem(commands.MODULES, "boom", "boom_command")
    assert main(["boom"]) == 4
    assert f"pip install 'qlx[{named}]'" in capsys.readouterr().err


def test_debug_shows_the_traceback(failing, capsys):
    failing(errors.Mismatch("another base"))
    assert main(["boom", "--debug"]) == 3
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.strip().endswith("qlx: another base")


def test_progress_and_library_prints_go_to_standard_error(failing, capsys):
    failing(errors.CheckFailed("no"))
    main(["boom"])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "chatter of a library" in captured.err
    assert "working" in captured.err


def test_json_failures_are_one_object(failing, capsys):
    failing(errors.Mismatch("another base"))
    assert main(["boom", "--json"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert error == {"kind": "Mismatch", "message": "another base", "exit_code": 3}


def test_json_usage_errors_are_one_object(capsys):
    assert main(["pack", "--json"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["exit_code"] == 2
    assert len(captured.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [["frobnicate"], ["merge", "--frob"], ["pack", "/nowhere", "-o", "x", "--to", "nf4"],
     ["pack", ".", "-o", "x", "--to", "int4", "--calibration", "."],
     ["plan", "--rank", "x"], ["serve", ".", "--port", "99999"], ["--frob"]],
)  # fmt: skip
def test_wrong_calls_end_with_2_and_say_where_to_look(arguments, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("qlx: ")
    assert "--help`" in captured.err
    assert len(captured.err.strip().splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_with_130(tmp_path, number):
    """A process that sleeps inside a command, ended by a signal."""
    script = tmp_path / "sleeper.py"
    script.write_text(
        "import sys, time\n"
        "from qlx.cli import commands, main, options\n"
        "@options.command('nap', examples=('qlx nap',))\n"
        "def command(session):\n"
        "    session.report('asleep')\n"
        "    time.sleep(60)\n"
        "sys.modules['nap'] = sys.modules['__main__']\n"
        "commands.MODULES['nap'] = 'nap'\n"
        "sys.exit(main(['nap']))\n"
    )
    with subprocess.Popen(
        [sys.executable, script], stderr=subprocess.PIPE, text=True, env={**os.environ}
    ) as process:
        assert process.stderr.readline() == "asleep\n"
        time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(20) == 130
        rest = process.stderr.read()
    assert rest.strip() == "qlx: interrupted; no output was left behind"
