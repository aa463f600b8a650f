"""Merging adapters that were trained on ternary, int4 and int8 bases: as training saw them."""

import numpy as np
import pytest
import torch

from qlx.adapters import delta_weight, read_adapter
from qlx.checkpoint import QuantSpec, open_checkpoint, read_probe, resolve_source
from qlx.errors import CheckFailed, Mismatch
from qlx.merging import merge
from qlx.models import load_model
from qlx.quant import SCALE_DTYPE, dequantize_tensor, quantize_tensor
from qlx.verification import verify
from qlx.weights import read_tensors
from tests.adapter_support import Case, make_adapter, make_base

SPECS = {
    "ternary": QuantSpec(method="qlora", scheme="ternary", group_size=64, weight_bits=2),
    "ternary-whole": QuantSpec(
        method="qlora", scheme="ternary", weight_bits=2, extras={SCALE_DTYPE: "float16"}
    ),
    "int4": QuantSpec(method="qlora", scheme="int4", group_size=32, weight_bits=4, symmetric=False),
    "int8": QuantSpec(method="qlora", scheme="int8", weight_bits=8),
}


def made(root, name, kind="llama", **options):
    base = make_base(root / "base", kind)
    return base, make_adapter(base, root / "adapter", Case(kind, SPECS[name], **options))


@pytest.mark.parametrize("kind", ["llama", "vit"])
@pytest.mark.parametrize("name", SPECS)
def test_merged_is_the_dequantized_base_plus_the_delta(name, kind, tmp_path):
    base, adapter = made(tmp_path, name, kind)
    merged = merge(str(base), [adapter.path], tmp_path / "merged", dtype="float32")
    stored, result = read_tensors(base), read_tensors(merged.path)
    record, weights = adapter.manifest.adapter, read_adapter(adapter.path)
    assert record.tensors
    for module, tensor in record.tensors.items():
        values = dequantize_tensor(quantize_tensor(stored[tensor], SPECS[name]), torch.float32)
        oracle = values.double() + delta_weight(weights.deltas[module]).double()
        assert (result[tensor].double() - oracle).abs().max() <= 1e-6
        assert (result[tensor] - stored[tensor]).abs().max() > 1e-3  # negative control
    untouched = set(stored) - set(adapter.manifest.quantization.tensors)
    assert all(torch.equal(stored[t], result[t]) for t in untouched)
    assert verify(merged.path).passed


@pytest.mark.parametrize("name", SPECS)
def test_an_adapter_replays_on_its_own_base_and_no_other(name, tmp_path):
    base, adapter = made(tmp_path, name)
    probe = read_probe(adapter.path / "probe.safetensors")
    model = load_model(open_checkpoint(adapter.path), resolve_source(str(base)))
    ids = {key: torch.from_numpy(value) for key, value in probe.inputs.items()}
    with torch.no_grad():
        logits = model(**ids).logits.numpy()
    rows = probe.inputs["attention_mask"].astype(bool)
    assert np.array_equal(logits[rows], probe.reference[rows])
    other = make_base(tmp_path / "other", "llama", seed=5)
    with pytest.raises(Mismatch):
        load_model(open_checkpoint(adapter.path), resolve_source(str(other)))


@pytest.mark.parametrize("name", ["ternary", "int4"])
def test_onto_the_original_base_is_another_model(name, tmp_path):
    """What as-trained avoids: the size of the difference is that of the quantization."""
    base, adapter = made(tmp_path, name)
    right = merge(str(base), [adapter.path], tmp_path / "right", dtype="float32")
    try:
        wrong = merge(
            str(base), [adapter.path], tmp_path / "wrong", dtype="float32", onto="original"
        )
    except CheckFailed:
        return
    a, b = read_tensors(right.path), read_tensors(wrong.path)
    tensor = adapter.manifest.quantization.tensors[0]
    assert not torch.allclose(a[tensor], b[tensor], atol=1e-3)


def test_dora_on_a_ternary_base(tmp_path):
    base, adapter = made(tmp_path, "ternary", options={"use_dora": True})
    merged = merge(str(base), [adapter.path], tmp_path / "merged", dtype="float32")
    assert verify(merged.path).passed


def test_codes_that_differ_from_the_record_are_refused(tmp_path):
    """Another group size quantizes to other codes; the fingerprint of training tells."""
    base, adapter = made(tmp_path, "int4")
    manifest = adapter.manifest
    spec = manifest.quantization.model_copy(update={"group_size": 64})
    from qlx.checkpoint import seal

    (adapter.path / "qlx.json").unlink()
    seal(adapter.path, manifest.model_copy(update={"quantization": spec, "files": {}}))
    with pytest.raises(Mismatch, match="other codes"):
        merge(str(base), [adapter.path], tmp_path / "merged", dtype="float32")
