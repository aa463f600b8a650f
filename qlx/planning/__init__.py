"""How much memory a training takes, told before a byte is loaded: shapes, parts, tables, suggestions.

Pure Python on numbers; nothing here reads weights or imports a numeric library.
"""

from qlx.planning.memory import Parts, Plan, check_rank, plan_shape, plan_size
from qlx.planning.public import PUBLIC_SHAPES, shape_from_count
from qlx.planning.recipes import base_shape, plan_recipe, recipe_setup
from qlx.planning.setup import Setup, WeightFormat, weight_format
from qlx.planning.shapes import Shape, shape_from_config
from qlx.planning.suggest import DEFAULT_RANKS, DEFAULT_SIZES, SizeTable, size_table, suggest
from qlx.planning.units import format_bytes, format_count, parse_bytes, parse_count

__all__ = [
    "DEFAULT_RANKS",
    "DEFAULT_SIZES",
    "PUBLIC_SHAPES",
    "Parts",
    "Plan",
    "Setup",
    "Shape",
    "SizeTable",
    "WeightFormat",
    "base_shape",
    "check_rank",
    "format_bytes",
    "format_count",
    "parse_bytes",
    "parse_count",
    "plan_recipe",
    "plan_shape",
    "plan_size",
    "recipe_setup",
    "shape_from_config",
    "shape_from_count",
    "size_table",
    "suggest",
    "weight_format",
]
