"""A recipe file, with command-line overrides, to a validated `Recipe`; errors name file, line and field."""

import difflib
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from qlx.errors import RecipeError, UsageError
from qlx.recipe.dialects import translate, translate_path
from qlx.recipe.schema import Recipe
from qlx.recipe.source import Located, Location, parse_value, read_yaml

__all__ = ["load_recipe", "validate"]


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe; `overrides` are `section.field=value` texts applied over the file.

    Raises:
        RecipeError: the first thing wrong, with file, line, field and what is allowed.
        UsageError: an override has no field or no equals sign.
    """
    located = translate(read_yaml(Path(path)), str(path))
    for override in overrides:
        located = _override(located, override)
    return validate(located, str(path))


def validate(located: Located, where: str) -> Recipe:
    """Validate parsed values; `where` is the file named in errors."""
    try:
        return Recipe.model_validate(located.value)
    except ValidationError as error:
        raise RecipeError(_message(error.errors(), located, where)) from error


def _override(located: Located, text: str) -> Located:
    key, equals, value = text.partition("=")
    written = key.strip().split(".")
    if not equals or not all(written):
        raise UsageError(f"--set {text!r}: write it as section.field=value")
    parts = translate_path(tuple(written))
    tree = dict(located.value)
    inner = tree
    for part in parts[:-1]:
        child = inner.get(part)
        if child is not None and not isinstance(child, dict):
            raise RecipeError(f"--set {text!r}: {part!r} is not a section")
        inner[part] = dict(child or {})
        inner = inner[part]
    inner[parts[-1]] = parse_value(value)
    lines = {at: line for at, line in located.lines.items() if at[: len(parts)] != parts}
    return Located(tree, {**lines, parts: 0})


def _message(details: Sequence[ErrorDetails], located: Located, where: str) -> str:
    """Describe the deepest error; what the members of a union each want is joined with `or`."""
    detail = max(details, key=lambda item: len(_strip_variants(item["loc"], located.value)))
    location = _strip_variants(detail["loc"], located.value)
    same = [
        item["msg"] for item in details if _strip_variants(item["loc"], located.value) == location
    ]
    if detail["type"] == "misfit":  # found by a section as a whole, which names the field
        location = (*location, *detail["ctx"]["field"].split("."))
    line = _line(location, located)
    field = ".".join(str(part) for part in location) or "recipe"
    place = f"{where}: " + ("--set: " if line == 0 else f"line {line}: ")
    if detail["type"] == "extra_forbidden":
        return f"{place}unknown field {field!r}{_did_you_mean(location)}"
    if detail["type"] == "missing":
        return f"{place}field {field!r} is missing"
    what = " or ".join(_plain(message) for message in dict.fromkeys(same))
    shown = "" if isinstance(detail["input"], dict) else f" (it is {detail['input']!r})"
    return f"{place}{field}: {what}{shown}"


def _plain(message: str) -> str:
    text = (
        message.removeprefix("Value error, ")
        .removeprefix("Input ")
        .replace("valid tuple", "list of names")
    )
    return f"{text[:1].lower()}{text[1:]}"


def _strip_variants(location: Iterable[str | int], value: Any) -> Location:
    """Drop the names pydantic adds for members of a union, keeping what stands in the file."""
    path: list[str | int] = []
    for part in location:
        if isinstance(value, dict):
            path.append(part)
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            path.append(part)
            value = value[part]
    return tuple(path)


def _line(location: Location, located: Located) -> int:
    while location not in located.lines and location:
        location = location[:-1]
    return located.lines.get(location, 1)


def _did_you_mean(location: Location) -> str:
    fields = _fields_at(location[:-1])
    close = difflib.get_close_matches(str(location[-1]), fields, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; allowed: {', '.join(sorted(fields))}"


def _fields_at(location: Location) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in location:
        field = model.model_fields.get(str(part))
        inner = (
            []
            if field is None
            else [t for t in _types(field.annotation) if issubclass(t, BaseModel)]
        )
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _types(annotation: Any) -> list[type]:
    members = typing.get_args(annotation) or (annotation,)
    return [member for member in members if isinstance(member, type)]
