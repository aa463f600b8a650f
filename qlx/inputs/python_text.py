"""The built-in language data: the running Python's own standard library, read as text, never imported.

`python_sources` are whole modules; `python_docstrings` are instruction pairs, the signature of a
function or class against the first line of its docstring. The order is that of the file names.
"""

import ast
import functools
import sysconfig
import warnings
from pathlib import Path

from qlx.errors import InputRefused

__all__ = ["python_docstrings", "python_sources"]

_LEFT_OUT = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo")
) | {"ensurepip", "pydoc_data", "encodings", "__pycache__", "lib-dynload", "__phello__"}
"""Directories whose modules are not read: tests, installed packages, tables rather than prose."""

_SUMMARY_LENGTH = (12, 100)
_SIGNATURE_LENGTH = 160

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@functools.cache
def python_sources() -> tuple[str, ...]:
    """The text of every module of the standard library, in order of path.

    Raises:
        InputRefused: the standard library is not there as source files.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = tuple(text for path in _modules(root) if (text := _read(path)) is not None)
    if not texts:
        raise InputRefused(
            f"{root}: this Python's standard library is not there as source files; use your own data"
        )
    return texts


@functools.cache
def python_docstrings() -> tuple[tuple[str, str], ...]:
    """(instruction, summary) pairs without repetition, in order of first appearance.

    The instruction asks to document a signature; the summary is the docstring's first line.
    """
    pairs: dict[tuple[str, str], None] = {}
    for text in python_sources():
        for node in ast.walk(_parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                pair = _pair(node)
                if pair is not None:
                    pairs[pair] = None
    return tuple(pairs)


def _modules(root: Path) -> list[Path]:
    inner = [path.relative_to(root) for path in root.rglob("*.py")]
    kept = [
        path
        for path in inner
        if not _LEFT_OUT.intersection(path.parts[:-1])
        and not path.name.startswith("_sysconfigdata")
    ]
    return [root / path for path in sorted(kept, key=Path.as_posix)]


def _read(path: Path) -> str | None:
    """The text of a file, or None for the few that are no UTF-8."""
    try:
        return path.read_text("utf-8")
    except (UnicodeDecodeError, OSError):
        return None


def _parse(text: str) -> ast.Module:
    """The syntax tree; an empty one for the few files that are written for another Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return ast.parse(text)
    except (SyntaxError, ValueError):
        return ast.Module([], [])


def _pair(node: Definition) -> tuple[str, str] | None:
    lines = (ast.get_docstring(node) or "").strip().splitlines()
    if not lines:
        return None
    summary, signature = lines[0].strip(), _signature(node)
    low, high = _SUMMARY_LENGTH
    if not low <= len(summary) <= high or len(signature) > _SIGNATURE_LENGTH:
        return None
    return f"Document this: {signature}", summary


def _signature(node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}"
    return f"def {node.name}({ast.unparse(node.args)})"
