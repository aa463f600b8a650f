"""Low-bit weights after training: what is packed, what survives it, and the files that others load."""

from qlx.packing.gguf import GGUF_TYPE, GGUF_TYPES, GgufType
from qlx.packing.healing import Healing
from qlx.packing.layouts import WHOLE, GroupSize
from qlx.packing.pack import TARGETS, Target, pack
from qlx.packing.retention import LayerRetention, layer_retention, overall
from qlx.packing.select import Selection, select_modules
from qlx.packing.writer import SHARD_BYTES, ShardWriter

__all__ = [
    "GGUF_TYPE",
    "GGUF_TYPES",
    "SHARD_BYTES",
    "TARGETS",
    "WHOLE",
    "GgufType",
    "GroupSize",
    "Healing",
    "LayerRetention",
    "Selection",
    "ShardWriter",
    "Target",
    "layer_retention",
    "overall",
    "pack",
    "select_modules",
]
