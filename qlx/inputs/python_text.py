"""The built-in language data: the running Python's own standard library, read as text, never imported.

`python_sources` are whole modules; `python_docstrings` are instruction pairs, the signature of a
function or class against the first line of its docstring. The order is that of the file names.
"""

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from qlx.errors import InputRefused

__all__ = ["python_docstrings", "python_sources"]

_LEFT_OUT = frozenset(
    ("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "ensurepip")
    + ("pydoc_data", "encodings", "__pycache__", "lib-dynload", "__phello__")
)
_SUMMARY_LENGTH = (12, 100)
_SIGNATURE_LENGTH = 160

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def python_sources() -> list[str]:
    """The text of every module of the standard library that parses, in order of path.

    Raises:
        InputRefused: the standard library is not there as source files.
    """
    return [text for text, _ in _modules()]


def python_docstrings() -> list[tuple[str, str]]:
    """(instruction, summary) pairs without repetition, in order of first appearance.

    The instruction asks to document a signature; the summary is the docstring's first line.
    """
    pairs: dict[tuple[str, str], None] = {}
    for _, tree in _modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                pair = _pair(node)
                if pair is not None:
                    pairs[pair] = None
    return list(pairs)


def _modules() -> Iterator[tuple[str, ast.Module]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = 0
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        inner = path.relative_to(root)
        if _LEFT_OUT.intersection(inner.parts[:-1]) or inner.name.startswith("_sysconfigdata"):
            continue
        parsed = _parse(path)
        if parsed is not None:
            found += 1
            yield parsed
    if not found:
        raise InputRefused(f"{root}: this Python's standard library is not there as source files; use your own data")


def _parse(path: Path) -> tuple[str, ast.Module] | None:
    """Text and syntax tree, or None for the few files that are no UTF-8 or no longer parse."""
    try:
        text = path.read_text("utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            return text, ast.parse(text)
    except (SyntaxError, ValueError, OSError):
        return None


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
