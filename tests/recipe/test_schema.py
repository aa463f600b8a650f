"""The schema of recipes, and that docs/recipes.md says of every field what it is."""

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from qlx.cli import main
from qlx.recipe import (
    AdapterSection,
    ArchitectureSection,
    BaseSection,
    DataSection,
    ProbeSection,
    QuantizationSection,
    Recipe,
    TrainingSection,
    json_schema,
    load_recipe,
)

DOCUMENT = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text("utf-8")
SECTIONS: dict[str, type[BaseModel]] = {
    "Top level": Recipe,
    "base": BaseSection,
    "base.from_scratch": ArchitectureSection,
    "data": DataSection,
    "adapter": AdapterSection,
    "quantization": QuantizationSection,
    "training": TrainingSection,
    "probe": ProbeSection,
}


def documented(heading: str) -> dict[str, str]:
    """Field to default, as the table below a heading has them."""
    (text,) = re.findall(rf"(?ms)^### {re.escape(heading)}\n(.*?)(?=^#|\Z)", DOCUMENT)
    return dict(re.findall(r"(?m)^\| `(\w+)` \| (.*?) \| \S.* \|$", text))


def written(model: type[BaseModel], name: str) -> str:
    """A field's default as the tables write it."""
    field = model.model_fields[name]
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is PydanticUndefined:
        return "–"
    if default is None or isinstance(default, BaseModel):
        return "none" if default is None else "the section's"
    plain = list(default) if isinstance(default, tuple) else default
    return f"`{plain if isinstance(plain, str) else json.dumps(plain)}`"


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_field_is_documented_with_its_default(heading: str) -> None:
    model = SECTIONS[heading]
    assert documented(heading) == {name: written(model, name) for name in model.model_fields}


def test_a_field_that_is_missing_in_the_document_is_found() -> None:
    class Another(ProbeSection):
        extra: int = 3

    assert documented("probe") != {name: written(Another, name) for name in Another.model_fields}


def test_every_section_is_in_the_document() -> None:
    nested = {
        name for name, field in Recipe.model_fields.items() if "Section" in str(field.annotation)
    }
    assert nested | {"Top level", "base.from_scratch"} == set(SECTIONS)


def test_recipes_in_the_document_are_read(tmp_path: Path) -> None:
    blocks = re.findall(r"(?ms)^```yaml\n(name: .*?)^```", DOCUMENT)
    assert len(blocks) == 2
    for block in blocks:
        (tmp_path / "r.yaml").write_text(block)
        assert load_recipe(tmp_path / "r.yaml").name in block


def test_the_schema_for_editors_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == json_schema()
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False
