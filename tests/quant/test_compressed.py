"""The layout of compressed-tensors against the library itself, bit for bit."""

from dataclasses import replace

import pytest
import torch

from qlx.checkpoint import QuantSpec
from qlx.errors import CorruptCheckpoint, Unsupported
from qlx.quant import (
    SCALE_DTYPE,
    ZERO_POINTS,
    compressed_entries,
    compressed_section,
    dequantize_tensor,
    packed_from_compressed,
    quantize_tensor,
    stored_quantization,
)

theirs = pytest.importorskip("compressed_tensors.compressors")
config = pytest.importorskip("compressed_tensors.quantization")
BITS = {"int8": 8, "int4": 4, "ternary": 2}
WITH_ZEROS = ("int8", "int4", "int2")
NAME = "model.layer.weight"


def packed(scheme, group_size=32, dtype="float32", columns=96, symmetric=True):
    torch.manual_seed(0)
    extras = {SCALE_DTYPE: dtype}
    spec = QuantSpec(scheme=scheme, group_size=group_size, symmetric=symmetric, extras=extras)
    weight = torch.randn(24, columns).to(getattr(torch, dtype))
    return quantize_tensor(weight, spec), spec


def with_fractions(scheme):
    """A weight with zero points that are no whole numbers, as a folded adapter leaves it."""
    ours, spec = packed(scheme, symmetric=False)
    zeros = ours.zeros + 0.3 * torch.randn(ours.zeros.shape)
    return replace(ours, zeros=zeros), spec.model_copy(update={"extras": {ZERO_POINTS: "float32"}})


def decompressed(entries, spec):
    """The weight as the library's own decompressor gives it, from its own reading of the section."""
    group = compressed_section(spec, ())["config_groups"]["group_0"]
    scheme = config.QuantizationScheme.model_validate(group)
    compressor = theirs.BaseCompressor.get_value_from_registry("pack-quantized")
    state = {name.rpartition(".")[2]: tensor for name, tensor in entries.items()}
    return compressor.decompress(state, scheme)["weight"]


CASES = [(s, g) for s in BITS for g in (32, None)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("scheme", "group_size"), CASES)
def test_the_library_gives_our_values_bit_for_bit(scheme, group_size, dtype):
    ours, spec = packed(scheme, group_size, dtype)
    entries = compressed_entries(ours, NAME)
    assert torch.equal(decompressed(entries, spec), dequantize_tensor(ours))


@pytest.mark.parametrize("scheme", BITS)
def test_one_code_bit_is_enough_to_tell(scheme):
    """The comparison above sees the smallest change there can be."""
    ours, spec = packed(scheme)
    entries = compressed_entries(ours, NAME)
    entries["model.layer.weight_packed"][3, 1] ^= 1
    wrong = decompressed(entries, spec) != dequantize_tensor(ours)
    assert wrong.sum() == 1


@pytest.mark.parametrize(("scheme", "group_size"), CASES)
@pytest.mark.parametrize("columns", [96, 64])
def test_reading_gives_back_what_was_written(scheme, group_size, columns):
    ours, spec = packed(scheme, group_size, columns=columns)
    stored = stored_quantization({"quantization_config": compressed_section(spec, ("lm_head",))})
    again = stored.read(compressed_entries(ours, NAME), NAME)
    assert again.identity()[0] == ours.identity()[0]
    assert all(torch.equal(*pair) for pair in zip(again.parts, ours.parts, strict=True))
    assert (stored.spec().scheme, stored.spec().group_size) == (scheme, group_size)


def test_rows_that_are_no_whole_words_are_filled_up():
    ours, _ = packed("int4", None, columns=43)
    entries = compressed_entries(ours, NAME)
    assert entries["model.layer.weight_packed"].shape == (24, 6)
    again = packed_from_compressed(entries, NAME, bits=4, group_size=None)
    assert torch.equal(again.values(), ours.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("scheme", WITH_ZEROS)
def test_zero_points_are_the_librarys_too(scheme, group_size, dtype):
    ours, spec = packed(scheme, group_size, dtype, symmetric=False)
    assert ours.zeros.any()
    entries = compressed_entries(ours, NAME)
    values = dequantize_tensor(ours)
    assert torch.equal(decompressed(entries, spec), values)
    section = compressed_section(spec, ("lm_head",))
    stored = stored_quantization({"quantization_config": section})
    again = stored.read(entries, NAME)
    assert again.identity()[0] == ours.identity()[0]
    assert all(torch.equal(*pair) for pair in zip(again.parts, ours.parts, strict=True))
    assert (stored.spec().scheme, stored.spec().symmetric) == (scheme, False)
    assert section["dequantize"] is True  # or transformers would look for unpacked ones
    entries["model.layer.weight_zero_point"][1, 0] ^= 1  # negative control
    wrong = decompressed(entries, spec) != values
    assert wrong.any(dim=1).sum() == 1
    assert stored.read(entries, NAME).zeros.ne(ours.zeros).sum() == 1


@pytest.mark.parametrize("scheme", ["int4", "int2"])
def test_zero_points_that_are_no_whole_numbers_are_kept_as_they_are(scheme):
    ours, spec = with_fractions(scheme)
    entries, values = compressed_entries(ours, NAME), dequantize_tensor(ours)
    assert torch.equal(decompressed(entries, spec), values)
    section = compressed_section(spec, ())
    again = stored_quantization({"quantization_config": section}).read(entries, NAME)
    assert again.identity()[0] == ours.identity()[0]
    assert all(torch.equal(*pair) for pair in zip(again.parts, ours.parts, strict=True))
    entries["model.layer.weight_zero_point"] *= 1.001  # negative control
    assert not torch.equal(decompressed(entries, spec), values)


def test_reordered_groups_are_not_written():
    ours, _ = packed("int4")
    with pytest.raises(Unsupported, match="reordered groups"):
        compressed_entries(replace(ours, groups=torch.arange(96).int() % 3), NAME)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"symmetric": False}, "zero points in some layers only"),
        ({"group_size": 64}, "groups of several sizes"),
        ({"strategy": "block", "group_size": None, "block_structure": [2, 32]}, "several rows"),
    ],
)
def test_descriptions_that_are_not_read_are_named(change, says):
    section = compressed_section(packed("int4")[1], ())
    other = {"targets": ["mlp"], "weights": {**section["config_groups"]["group_0"]["weights"]}}
    other["weights"] |= change
    section["config_groups"]["group_1"] = other
    with pytest.raises(Unsupported, match=says):
        stored_quantization({"quantization_config": section})


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("weight_packed", None, "is missing"),
        ("weight_scale", None, "is missing"),
        ("weight_packed", lambda t: t[:, :-1], "do not fit the shape"),
        ("weight_packed", lambda t: t.float(), "codes torch.float32"),
        ("weight_shape", lambda t: t[:1], "do not fit the shape"),
        ("weight_scale", lambda t: t[:-1], "do not fit codes"),
        ("weight_scale", lambda t: t * float("nan"), "NaN"),
    ],
)
def test_parts_that_do_not_fit_are_named(part, change, says):
    entries = compressed_entries(packed("int4")[0], NAME)
    key = f"model.layer.{part}"
    if change is None:
        del entries[key]
    else:
        entries[key] = change(entries[key])
    with pytest.raises(CorruptCheckpoint, match=says):
        packed_from_compressed(entries, NAME, bits=4, group_size=32)


def test_a_code_that_is_not_ternary_is_refused():
    entries = compressed_entries(packed("ternary")[0], NAME)
    entries["model.layer.weight_packed"].zero_()  # -2 everywhere
    with pytest.raises(CorruptCheckpoint, match=r"outside -1…1"):
        packed_from_compressed(entries, NAME, bits=2, group_size=32)
