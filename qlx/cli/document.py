"""The command reference, docs/commands.md, made from the commands' own help.

`python -m qlx.cli.document > docs/commands.md` writes it anew; a test compares it.
"""

import sys

import click

from qlx.cli.commands import MODULES, program

_HEAD = """# Commands

Made from the program's own help by `python -m qlx.cli.document > docs/commands.md`; a test compares
the two. What holds for every command:

- `-o/--output` is a new directory. It appears whole or not at all; one that exists is refused unless
  `--force`, which swaps the two in one step. It may not be, hold or lie inside an input, nor lie
  inside any checkpoint; nor may a report or picture, which has no place among a model's files
  either. That is asked before any work is done.
- `--force` replaces only what qlx made: an empty directory, or a checkpoint, damaged or not, that
  holds nothing but files that its `qlx.json` lists. Anything else in it is named, and stays.
- `--base` is a local directory or a hub name, optionally with `@revision`.
- The result goes to standard output, as text or with `--json` as exactly one JSON object; progress
  and warnings go to standard error, where `--quiet` silences them. A failure under `--json` is the
  object `{"error": {"kind": …, "message": …, "exit_code": …}}`.
- An error is one line on standard error, `qlx: …`. A traceback comes only with `--debug`.

## Exit codes

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a check failed: outputs differ, too little of the adapter survives, a plan does not fit |
| 2 | the call is wrong: unknown option, missing argument, output exists |
| 3 | an input was refused: corrupt, mismatched, unsupported, unsafe |
| 4 | an optional part is not installed; the message names the extra |
| 5 | no room: disk or memory, or for the result on standard output |
| 70 | a defect of qlx itself; please report it with what `--debug` prints |
| 130 | interrupted (SIGINT or SIGTERM); the message says what was left behind, if anything |
| 141 | done, but standard output was closed before the result was printed (as after SIGPIPE) |

A result that cannot be printed changes only the code 0: a failed check stays 1. Progress that cannot
be printed stops nothing.
"""


def reference() -> str:
    """The whole document as Markdown."""
    root = click.Context(program, info_name="qlx", help_option_names=["-h", "--help"])
    parts = [_HEAD.rstrip()]
    for name in MODULES:
        command = program.get_command(root, name)
        assert command is not None
        context = click.Context(command, parent=root, info_name=name, max_content_width=96)
        context.terminal_width = 96
        parts.append(f"## qlx {name}\n\n```text\n{command.get_help(context)}\n```")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
