"""Bases that come quantized: what `config.json` says of them, and their weights one by one.

GPTQ, AWQ, compressed-tensors, BitNet and 4-bit bitsandbytes checkpoints keep codes in layouts and
under names of their own. Here a weight goes by the name it would have in a plain checkpoint,
`<module>.weight`, whatever parts it has.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, Self

from torch import Tensor

from qlx.checkpoint import QuantSpec
from qlx.errors import CorruptCheckpoint, Unsupported
from qlx.quant.bitnet import BitnetClass, packed_from_bitnet
from qlx.quant.codec import PackedTensor
from qlx.quant.codec4bit import FOUR_BIT, Scheme
from qlx.quant.compressed import COMPRESSED_PARTS, compressed_scheme, packed_from_compressed
from qlx.quant.integers import IntegerScheme
from qlx.quant.layout import entry_names, packed_from_entries, packed_weights, stored_state
from qlx.quant.words import packed_from_awq, packed_from_gptq, scheme_of_bits
from qlx.weights import TensorInfo, torch_dtype_name

__all__ = ["STORED_BACKENDS", "StoredQuantization", "stored_quantization"]

Method = Literal["gptq", "awq", "compressed-tensors", "bitnet", "bitsandbytes"]

STORED_BACKENDS: tuple[Method, ...] = (
    "gptq",
    "awq",
    "compressed-tensors",
    "bitnet",
    "bitsandbytes",
)
"""Layouts of bases that come quantized and can be read."""

_WORD_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_PLAIN_SHAPE = ".weight_shape"
_MARKS: Mapping[Method, str] = {
    "gptq": ".qweight",
    "awq": ".qweight",
    "compressed-tensors": ".weight_packed",
    "bitnet": ".weight_scale",
}
"""How the name of the tensor ends that each packed weight has one of."""


@dataclass(frozen=True)
class StoredQuantization:
    """How the weights of a base are stored.

    `group_size` is None for one scale a row or tensor; `zeros_less_one` and `linear_class` are what
    `packed_from_gptq` and `packed_from_bitnet` ask for. Some weights may have `other_bits` than `bits`.
    """

    method: Method
    scheme: IntegerScheme | Scheme
    bits: int
    group_size: int | None
    symmetric: bool
    zeros_less_one: bool = True
    linear_class: BitnetClass = "bitlinear"
    double_quant: bool = False
    other_bits: tuple[int, ...] = ()

    def weight_names(self, names: Iterable[str]) -> list[str]:
        """The packed weights, as `<module>.weight`, among the tensor names of a checkpoint, sorted."""
        if self.method == "bitsandbytes":
            return list(packed_weights(names))
        mark = _MARKS[self.method]
        return sorted(f"{n.removesuffix(mark)}.weight" for n in names if n.endswith(mark))

    def part_names(self, name: str) -> tuple[str, ...]:
        """Names of the tensors that make up the weight `name`; some of the last may be absent."""
        if self.method == "bitsandbytes":
            names = (entry_names(name, scheme, nested=True) for scheme in FOUR_BIT)
            return tuple(dict.fromkeys(part for parts in names for part in parts))
        if self.method == "bitnet":
            return (name, f"{name}_scale")
        stem = name.removesuffix(".weight")
        parts = COMPRESSED_PARTS if self.method == "compressed-tensors" else _WORD_PARTS
        return tuple(f"{stem}.{part}" for part in parts)

    def state_names(self, names: Iterable[str]) -> list[str]:
        """The small tensors that say what headers do not, which `plain_info` needs to see."""
        if self.method == "compressed-tensors":
            return sorted(name for name in names if name.endswith(_PLAIN_SHAPE))
        return list(packed_weights(names).values()) if self.method == "bitsandbytes" else []

    def as_states_say(self, names: Iterable[str], states: Mapping[str, Tensor]) -> Self:
        """The same, with what only the files tell: block size and scheme of bitsandbytes' weights.

        Raises:
            CorruptCheckpoint: there is no packed weight.
            Unsupported: the weights are not all packed alike.
        """
        if self.method != "bitsandbytes":
            return self
        found = [stored_state(states, name) for name in self.weight_names(names)]
        kinds = {(state.scheme, state.block_size, state.nested) for state in found}
        if len(kinds) != 1:
            raise (Unsupported if kinds else CorruptCheckpoint)(
                f"its 4-bit weights are of {len(kinds)} kinds (scheme, block size, double quantization); "
                "one is expected"
            )
        ((scheme, block_size, nested),) = kinds
        return replace(self, scheme=scheme, group_size=block_size, double_quant=nested)

    def plain_info(
        self, infos: Mapping[str, TensorInfo], name: str, states: Mapping[str, Tensor]
    ) -> TensorInfo:
        """What the weight `name` would be in a plain checkpoint; the offsets only count its bytes.

        Its dtype is that of its scales, or what it was before bitsandbytes. `infos` holds the parts
        as the files' headers have them, `states` the tensors of `state_names`.

        Raises:
            CorruptCheckpoint: a part is missing.
        """
        if self.method == "bitsandbytes":
            state = stored_state(states, name)
            size = prod(state.shape) * state.dtype.itemsize
            return TensorInfo(name, torch_dtype_name(state.dtype), state.shape, 0, size)
        first, *rest = self.part_names(name)
        scale = rest[1] if self.method in ("gptq", "awq") else rest[0]
        if first not in infos or scale not in infos:
            raise CorruptCheckpoint(f"tensor {name!r}: its codes or scales are missing")
        shape = self._plain_shape(infos[first], states.get(rest[-1]))
        dtype = infos[scale].dtype
        return TensorInfo(name, dtype, shape, 0, shape[0] * shape[1] * (4 if dtype == "F32" else 2))

    def _plain_shape(self, codes: TensorInfo, stored: Tensor | None) -> tuple[int, int]:
        """[out, in] of a weight from the header of its codes, or as `stored` beside them."""
        if self.method == "compressed-tensors":
            if stored is None or stored.numel() != 2:
                raise CorruptCheckpoint(f"tensor {codes.name!r}: no shape of 2 numbers beside it")
            return int(stored[0]), int(stored[1])
        rows, columns = (int(size) for size in codes.shape)
        words = 32 // self.bits
        if self.method == "bitnet":
            return rows * (4 if codes.dtype == "U8" else 1), columns
        return (columns, rows * words) if self.method == "gptq" else (columns * words, rows)

    def read(self, entries: Mapping[str, Tensor], name: str) -> PackedTensor:
        """The packed weight `name` from the tensors it is made of.

        Raises:
            CorruptCheckpoint: a part is missing, or does not fit the others.
            Unsupported: the layout is known but not this use of it.
        """
        if self.method == "bitsandbytes":
            return packed_from_entries(entries, name)
        if self.method == "bitnet":
            return packed_from_bitnet(entries, name, self.linear_class)
        if self.method == "awq":
            return packed_from_awq(entries, name, bits=self.bits)
        if self.method == "compressed-tensors":
            return packed_from_compressed(
                entries,
                name,
                bits=self.bits,
                group_size=self.group_size,
                other_bits=self.other_bits,
                symmetric=self.symmetric,
            )
        return packed_from_gptq(
            entries,
            name,
            bits=self.bits,
            symmetric=self.symmetric,
            zeros_less_one=self.zeros_less_one,
        )

    def spec(self, **fields: Any) -> QuantSpec:
        """The QuantSpec of a training on this base; `fields` are added to it."""
        return QuantSpec(
            method="qlora",
            weight_bits=self.bits,
            scheme=self.scheme,
            group_size=self.group_size,
            symmetric=self.symmetric,
            double_quant=self.double_quant,
            backend=self.method,
            **fields,
        )


def stored_quantization(config: Mapping[str, Any]) -> StoredQuantization | None:
    """What a `config.json` says of its weights; None for plain ones.

    Block size and scheme of bitsandbytes' weights are in the files (`as_states_say`).

    Raises:
        Unsupported: another method, or a variant of these that is not read (the message says why).
    """
    section = config.get("quantization_config")
    if section is None:
        return None
    readers: Mapping[str, Callable[[Mapping[str, Any]], StoredQuantization]] = {
        "gptq": _gptq,
        "awq": _awq,
        "compressed-tensors": _compressed,
        "bitnet": _bitnet,
        "bitsandbytes": _bitsandbytes,
    }
    method = section.get("quant_method")
    if method not in readers:
        raise Unsupported(
            f"weights quantized by {method!r} cannot be read; {', '.join(readers)} can, or start "
            "from the plain model"
        )
    return readers[method](section)


def _gptq(section: Mapping[str, Any]) -> StoredQuantization:
    version = str(section.get("checkpoint_format") or section.get("format") or "gptq").lower()
    if version not in ("gptq", "gptq_v2"):
        raise Unsupported(f"GPTQ weights in the format {version!r}; gptq and gptq_v2 can be read")
    if section.get("dynamic"):
        raise Unsupported("GPTQ weights whose bits differ from layer to layer (dynamic)")
    bits = int(section.get("bits", 4))
    return StoredQuantization(
        method="gptq",
        scheme=scheme_of_bits("gptq", bits),
        bits=bits,
        group_size=_group_size(section),
        symmetric=bool(section.get("sym", True)),
        zeros_less_one=version == "gptq",
    )


def _awq(section: Mapping[str, Any]) -> StoredQuantization:
    version = str(section.get("version") or section.get("format") or "gemm").lower()
    if version != "gemm":
        raise Unsupported(f"AWQ weights of version {version!r}; gemm can be read")
    bits = int(section.get("bits", section.get("w_bit", 4)))
    scheme = scheme_of_bits("awq", bits)
    return StoredQuantization("awq", scheme, bits, _group_size(section), symmetric=False)


def _compressed(section: Mapping[str, Any]) -> StoredQuantization:
    groups = list(dict(section.get("config_groups") or {}).values())
    if section.get("format") != "pack-quantized" or not groups:
        raise Unsupported(
            f"compressed-tensors weights in the format {section.get('format')!r} with {len(groups)} "
            "config_groups; pack-quantized can be read"
        )
    found = [group.get("weights") or {} for group in groups]
    symmetric = {weights.get("symmetric", True) is True for weights in found}
    blocks = [weights.get("block_structure") or (1, weights.get("group_size")) for weights in found]
    unread = {
        "zero points in some layers only": len(symmetric) > 1,
        "blocks of several rows": any(rows != 1 for rows, _ in blocks),
        "codes of floats": any(weights.get("type", "int") != "int" for weights in found),
        "reordered groups": any(weights.get("actorder") is not None for weights in found),
        "rounded inputs": any(group.get("input_activations") is not None for group in groups),
        "a transform": section.get("transform_config") not in (None, {}),
        "groups of several sizes": len({size for _, size in blocks}) > 1,
    }
    for what, is_found in unread.items():
        if is_found:
            raise Unsupported(f"compressed-tensors weights with {what}")
    bits, *others = (int(weights.get("num_bits", 8)) for weights in found)
    return StoredQuantization(
        method="compressed-tensors",
        scheme=compressed_scheme(bits, symmetric=True in symmetric),
        bits=bits,
        group_size=blocks[0][1],
        symmetric=True in symmetric,
        other_bits=tuple(sorted({*others} - {bits})),
    )


def _bitnet(section: Mapping[str, Any]) -> StoredQuantization:
    if section.get("quantization_mode", "offline") != "offline":
        raise Unsupported(
            "a BitNet base in online mode keeps plain weights; remove quantization_config from its "
            "config.json and train with quant_type: ternary, group_size: whole, activation_bits: 8"
        )
    if section.get("use_rms_norm"):
        raise Unsupported("BitNet layers with a norm of their own (use_rms_norm)")
    linear_class = section.get("linear_class", "bitlinear")
    if linear_class not in ("bitlinear", "autobitlinear"):
        raise Unsupported(f"BitNet layers of class {linear_class!r}")
    return StoredQuantization(
        "bitnet", "ternary", 2, None, symmetric=True, linear_class=linear_class
    )


def _bitsandbytes(section: Mapping[str, Any]) -> StoredQuantization:
    if not section.get("load_in_4bit"):
        raise Unsupported(
            "bitsandbytes weights of 8 bits; its 4-bit ones can be read, or start from the plain model "
            "with quant_type: int8"
        )
    storage = section.get("bnb_4bit_quant_storage", "uint8")
    if storage != "uint8":
        raise Unsupported(f"bitsandbytes codes stored as {storage}; as uint8 they can be read")
    scheme = section.get("bnb_4bit_quant_type", "fp4")
    if scheme not in FOUR_BIT:
        raise Unsupported(f"bitsandbytes weights of type {scheme!r}")
    double = bool(section.get("bnb_4bit_use_double_quant", False))
    return StoredQuantization("bitsandbytes", scheme, 4, 64, symmetric=True, double_quant=double)


def _group_size(section: Mapping[str, Any]) -> int | None:
    size = int(section.get("group_size", section.get("q_group_size", 128)))
    return None if size == -1 else size
