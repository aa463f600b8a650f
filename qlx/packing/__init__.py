"""Low-bit weights after training: what is packed, what survives it, and the files that others load."""

from qlx.packing.layouts import WHOLE, GroupSize, Target
from qlx.packing.pack import TARGETS, pack
from qlx.packing.retention import LayerRetention, layer_retention, overall
from qlx.packing.select import Selection, select_modules
from qlx.packing.writer import SHARD_BYTES, ShardWriter

__all__ = [
    "SHARD_BYTES",
    "TARGETS",
    "WHOLE",
    "GroupSize",
    "LayerRetention",
    "Selection",
    "ShardWriter",
    "Target",
    "layer_retention",
    "overall",
    "pack",
    "select_modules",
]
