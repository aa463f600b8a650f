"""YAML text to plain values, with the line of every field, and nothing a recipe has no use for.

Refused: duplicate keys, anchors and aliases, tags that name code, keys that are not text, deep nesting.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qlx.errors import RecipeError

__all__ = ["Located", "parse_value", "read_yaml"]

_MAX_BYTES = 2**20
_MAX_DEPTH = 16

Location = tuple[str | int, ...]


@dataclass(frozen=True)
class Located:
    """A parsed value and, for each path into it, the line (from 1) where that field stands."""

    value: Any
    lines: Mapping[Location, int] = field(default_factory=dict)


def read_yaml(path: Path) -> Located:
    """Parse a recipe file.

    Raises:
        RecipeError: unreadable, not YAML, or using what recipes do not allow; names file and line.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
        text = data.decode("utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start})") from error
    if len(data) > _MAX_BYTES:
        raise RecipeError(f"{path}: larger than 1 MiB; a recipe is a page of text")
    _refuse_aliases(path, text)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise _not_yaml(path, error) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{path}: not YAML ({error})") from error
    lines: dict[Location, int] = {}
    value = {} if node is None else _convert(path, node, (), lines)
    if not isinstance(value, dict):
        raise RecipeError(
            f"{path}: line 1: a recipe is a mapping of sections, not a {type(value).__name__}"
        )
    return Located(value, lines)


def _refuse_aliases(path: Path, text: str) -> None:
    """Aliases are refused before anything is built from them, so that no document can multiply itself."""
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                line = event.start_mark.line + 1 if event.start_mark else 1
                raise RecipeError(f"{path}: line {line}: anchors and aliases are not allowed")
    except yaml.MarkedYAMLError as error:
        raise _not_yaml(path, error) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML ({error})") from error


def _not_yaml(path: Path, error: yaml.MarkedYAMLError) -> RecipeError:
    line = error.problem_mark.line + 1 if error.problem_mark else 1
    return RecipeError(f"{path}: line {line}: not YAML ({error.problem})")


def _convert(path: Path, node: yaml.Node, at: Location, lines: dict[Location, int]) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(at, line)
    if len(at) > _MAX_DEPTH:
        raise RecipeError(f"{path}: line {line}: nested deeper than {_MAX_DEPTH} levels")
    if isinstance(node, yaml.MappingNode):
        return _convert_mapping(path, node, at, lines)
    if isinstance(node, yaml.SequenceNode):
        return [_convert(path, item, (*at, index), lines) for index, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    return _scalar(path, node)


def _convert_mapping(
    path: Path, node: yaml.MappingNode, at: Location, lines: dict[Location, int]
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
            raise RecipeError(f"{path}: line {line}: field names are plain text")
        if key_node.value in result:
            raise RecipeError(f"{path}: line {line}: field {key_node.value!r} appears twice")
        lines[(*at, key_node.value)] = line
        result[key_node.value] = _convert(path, value_node, (*at, key_node.value), lines)
    return result


def _scalar(path: Path, node: yaml.ScalarNode) -> Any:
    line = node.start_mark.line + 1
    if node.tag not in (
        f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null")
    ):
        raise RecipeError(
            f"{path}: line {line}: {node.tag} is not allowed; use text, numbers, true or false"
        )
    if node.tag.endswith(":str"):
        return _number_like(node)
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(
            f"{path}: line {line}: {node.value!r} cannot be read ({error})"
        ) from error


def _number_like(node: yaml.ScalarNode) -> Any:
    """YAML 1.1 reads 2e-4 as text for want of a dot; people mean the number."""
    if node.style is None:
        try:
            return float(node.value) if "e" in node.value.lower() else node.value
        except ValueError:
            return node.value
    return node.value


def parse_value(text: str) -> Any:
    """A value given on the command line (`--set key=value`), read as YAML would.

    Raises:
        RecipeError: not a plain value.
    """
    where = Path("--set")
    _refuse_aliases(where, text)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set: {text!r} is not a YAML value") from error
    return None if node is None else _convert(where, node, (), {})
