"""Recipes: the user's YAML, read strictly into typed sections."""

from qlx.recipe.load import load_recipe
from qlx.recipe.patterns import refused_pattern
from qlx.recipe.schema import (
    AdapterSection,
    ArchitectureSection,
    BaseSection,
    DataSection,
    ProbeSection,
    QuantizationSection,
    Recipe,
    TrainingSection,
    json_schema,
)

__all__ = [
    "AdapterSection",
    "ArchitectureSection",
    "BaseSection",
    "DataSection",
    "ProbeSection",
    "QuantizationSection",
    "Recipe",
    "TrainingSection",
    "json_schema",
    "load_recipe",
    "refused_pattern",
]
