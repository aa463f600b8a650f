"""Recipes written for other tools: their names of fields, translated to ours with their lines.

Understood are the configuration of ViT heatmap models with `lora` and `quantization` sections, PEFT's
and bitsandbytes' own names, and flat `qlora_*` settings. `docs/migration.md` has the whole table.
Translation only moves and drops fields; whether their values are right is for the schema to say.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from qlx.errors import RecipeError
from qlx.recipe.source import Located, Location

__all__ = ["MOVES", "translate", "translate_path"]

MOVES: tuple[tuple[Location, Location], ...] = (
    (("model_name",), ("name",)),
    (("lora",), ("adapter",)),
    (("qlora_r",), ("adapter", "rank")),
    (("qlora_lora_alpha",), ("adapter", "alpha")),
    (("qlora_dropout",), ("adapter", "dropout")),
    (("adapter", "r"), ("adapter", "rank")),
    (("adapter", "lora_alpha"), ("adapter", "alpha")),
    (("adapter", "lora_dropout"), ("adapter", "dropout")),
    (("adapter", "vera_dropout"), ("adapter", "dropout")),
    (("quantization", "bnb_4bit_quant_type"), ("quantization", "quant_type")),
    (("quantization", "bnb_4bit_use_double_quant"), ("quantization", "double_quant")),
    (("quantization", "bnb_4bit_compute_dtype"), ("quantization", "compute_dtype")),
)
"""Where a field of another tool stands in ours. Sections come before the fields inside them."""

_SWITCHES: tuple[Location, ...] = (
    ("adapter", "enabled"),
    ("quantization", "enabled"),
    ("quantization", "load_in_4bit"),
)
_QLORA: Mapping[str, Any] = {"quant_type": "nf4", "double_quant": True, "compute_dtype": "bfloat16"}
_HEATMAP = ("vit_heatmap", "vit_lora_heatmap")
_NOT_IN_HEATMAP_MODELS = "pooler"


def translate(located: Located, where: str) -> Located:
    """The same recipe in our names; one written in ours comes back as it is.

    A section with `enabled: false` is left out. `qlora_*` settings without a section `quantization`
    mean NF4 with double quantization, computing in bfloat16.

    Raises:
        RecipeError: a field stands there under both names, or a switch is neither true nor false.
    """
    draft = _Draft(located, where)
    flat = any(str(key).startswith("qlora_") for key in located.value)
    for old, new in MOVES:
        draft.move(old, new)
    for switch in _SWITCHES:
        draft.switch(switch)
    if flat and draft.has(("adapter",)) and not draft.has(("quantization",)):
        draft.put(("quantization",), dict(_QLORA))
    if located.value.get("model_name") in _HEATMAP:
        draft.heatmap()
    return Located(draft.value, draft.lines)


def translate_path(path: Location) -> Location:
    """Where a field given by its path, as in `--set lora.r=8`, stands in our names."""
    for old, new in MOVES:
        if path[: len(old)] == old:
            path = (*new, *path[len(old) :])
    return path


class _Draft:
    """A recipe being translated: a copy of its values, and the lines they stand on."""

    def __init__(self, located: Located, where: str) -> None:
        self.value: dict[str, Any] = {
            key: dict(inner) if isinstance(inner, dict) else inner
            for key, inner in located.value.items()
        }
        self.lines: dict[Location, int] = dict(located.lines)
        self._where = where

    def has(self, path: Location) -> bool:
        parent = self._parent(path)
        return parent is not None and path[-1] in parent

    def put(self, path: Location, value: Any) -> None:
        parent = self._parent(path, make=True)
        assert parent is not None
        parent[path[-1]] = value

    def move(self, old: Location, new: Location) -> None:
        """Rename a field, or a section with all that is in it."""
        if not self.has(old):
            return
        if self.has(new):
            raise RecipeError(
                f"{self._at(old)}: {_dotted(old)!r} is another name of {_dotted(new)!r}, which line "
                f"{self.lines.get(new, 1)} sets too; keep one"
            )
        self.put(new, self._take(old))
        if len(new) > 1:
            self.lines.setdefault(new[:-1], self.lines.get(old, 1))
        for path, line in list(self.lines.items()):
            if path[: len(old)] == old:
                self.lines[(*new, *path[len(old) :])] = line
                del self.lines[path]

    def switch(self, path: Location) -> None:
        """Take out a switch, and with it the section that it switches off."""
        if not self.has(path):
            return
        on = self._take(path)
        if not isinstance(on, bool):
            raise RecipeError(f"{self._at(path)}: {_dotted(path)}: true or false (it is {on!r})")
        if not on:
            self._take(path[:-1])

    def heatmap(self) -> None:
        """What the name of a heatmap model says: the task, and that it has no pooler to leave out."""
        self.value.setdefault("task", "heatmap")
        section = self.value.get("quantization")
        if isinstance(section, dict) and isinstance(section.get("skip_modules"), list):
            section["skip_modules"] = list(_without_pooler(section["skip_modules"]))

    def _parent(self, path: Location, *, make: bool = False) -> dict[Any, Any] | None:
        parent: dict[Any, Any] = self.value
        for part in path[:-1]:
            if make and parent.get(part) is None:
                parent[part] = {}
            inner = parent.get(part)
            if not isinstance(inner, dict):
                return None
            parent = inner
        return parent

    def _take(self, path: Location) -> Any:
        parent = self._parent(path)
        assert parent is not None
        return parent.pop(path[-1])

    def _at(self, path: Location) -> str:
        return f"{self._where}: line {self.lines.get(path, 1)}"


def _without_pooler(names: Iterable[Any]) -> Iterable[Any]:
    return (name for name in names if str(name).split(".")[0] != _NOT_IN_HEATMAP_MODELS)


def _dotted(path: Location) -> str:
    return ".".join(map(str, path))
