"""What `verify` must catch: every seeded defect, in checkpoints whose digests are in order.

A defect is written into the weights and the directory sealed again, so that only the replay can
see it. The same checkpoints pass untouched.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from qlx.checkpoint import (
    QuantSpec,
    open_checkpoint,
    read_manifest,
    read_probe,
    seal,
    write_probe,
)
from qlx.errors import CorruptCheckpoint, InputRefused, Mismatch, UsageError
from qlx.merging import merge
from qlx.packing import pack
from qlx.quant import dequantize_tensor, packed_entries, packed_from_entries, quantize_tensor
from qlx.testing import assert_equivalent, assert_verified
from qlx.verification import to_json, verify
from qlx.weights import read_tensors, write_tensors
from tests.adapter_support import NF4, Case, make_adapter, make_base

ADAPTER, MODEL = "adapter_model.safetensors", "model.safetensors"
OPTIONS = {"vit": {"modules_to_save": ("classifier",)}, "llama": {}}


class Family:
    """A base and everything made from it; `copy` gives a directory of one kind to spoil."""

    def __init__(self, root: Path, kind: str, base: Path, adapter: Path) -> None:
        self.kind, self.root, self.base = kind, root, base
        self.other_base = make_base(root / "other_base", kind, seed=9)
        shutil.copytree(adapter, root / "adapter")
        self.adapter = open_checkpoint(root / "adapter")
        self.merged = merge(self.base, [self.adapter.path], root / "merged")
        merge(self.base, [self.adapter.path], root / "merged16", dtype="bfloat16")
        pack(self.merged.path, root / "packed", to="nf4", min_retention=0.5)
        self.names = self.adapter.manifest.adapter.tensors
        stored = read_tensors(self.base)
        spec = self.adapter.manifest.quantization
        self.before = {
            name: dequantize_tensor(quantize_tensor(stored[name], spec), torch.float32)
            for name in spec.tensors
        }
        self.stored = stored

    def copy(self, kind: str, target: Path) -> Path:
        return shutil.copytree(self.root / kind, target / kind)

    def weight(self, leaf: str, layer: int = 0) -> str:
        return next(
            name
            for module, name in self.names.items()
            if f"layers.{layer}." in module and module.endswith(leaf)
        )


TRAINED = {"trained-vit": "digits", "trained-llama": "python"}


@pytest.fixture(scope="module", params=["vit", "llama", *TRAINED])
def family(request, tmp_path_factory):
    """Drawn adapters with a saved head, and really trained ones with their small deltas."""
    root, kind = tmp_path_factory.mktemp(request.param), request.param.removeprefix("trained-")
    if request.param in TRAINED:
        name = TRAINED[request.param]
        base, run = (request.getfixturevalue(f"{name}_{part}") for part in ("base", "run"))
        return Family(root, kind, base, run)
    base = make_base(root / "base", kind)
    made = make_adapter(base, root / "made", Case(kind, NF4, options=OPTIONS[kind]))
    return Family(root, kind, base, made.path)


def spoil(path: Path, change) -> Path:
    """Apply `change` to the tensors of a checkpoint's weight file and seal it again."""
    file = path / (ADAPTER if (path / ADAPTER).exists() else MODEL)
    tensors = read_tensors(file)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    assert any(not torch.equal(tensors[name], before[name]) for name in before), "no defect"
    write_tensors(file, tensors)
    manifest, _ = read_manifest(path)
    seal(path, manifest)
    open_checkpoint(path)
    return path


def failures(report):
    assert json.loads(to_json(report))["passed"] is report.passed
    return [check.name for check in report.failures]


@pytest.mark.parametrize("kind", ["adapter", "merged", "merged16", "packed"])
def test_untouched_checkpoints_pass(family, kind):
    report = verify(family.root / kind, base=family.base if kind == "adapter" else None)
    assert report.passed, failures(report)
    assert len(report.checks) >= 4


def _sign(family, w):
    name = family.weight("q_proj")
    w[name] = 2 * family.before[name] - w[name]


def _dropped(family, w):
    name = family.weight("o_proj", 1)
    w[name] = family.before[name].clone()


def _doubled(family, w):
    for name in family.names.values():
        w[name] = 2 * w[name] - family.before[name]


def _doubled_once(family, w):
    name = family.weight("fc1" if family.kind == "vit" else "up_proj")
    w[name] = 2 * w[name] - family.before[name]


def _transposed(family, w):
    name = family.weight("q_proj")
    w[name] = family.before[name] + (w[name] - family.before[name]).T


def _root_scaling(family, w):
    for name in family.names.values():  # alpha / sqrt(r) instead of alpha / r, with r = 4
        w[name] = family.before[name] + 2 * (w[name] - family.before[name])


def _swapped(family, w):
    first, second = family.weight("q_proj", 0), family.weight("q_proj", 1)
    w[first], w[second] = w[second], w[first]


def _duplicated(family, w):
    w[family.weight("v_proj", 1)] = w[family.weight("v_proj", 0)].clone()


def _exchanged_projections(family, w):
    first, second = family.weight("q_proj"), family.weight("o_proj")
    w[first], w[second] = w[second], w[first]


def _original_base(family, w):
    for name in family.names.values():
        w[name] = family.stored[name] + (w[name] - family.before[name])


def _one_layer_on_the_original(family, w):
    name = family.weight("q_proj")
    w[name] = family.stored[name] + (w[name] - family.before[name])


def _rounded_again(family, w):
    spec = family.adapter.manifest.quantization
    for name in family.names.values():
        w[name] = dequantize_tensor(quantize_tensor(w[name], spec))


def _block_off_by_one(family, w):
    name = family.weight("v_proj")
    base = family.before[name]
    w[name] = w[name] - base + base.reshape(-1).roll(64).reshape(base.shape)


def _sixteen_bits(family, w):
    for name in family.names.values():
        w[name] = w[name].bfloat16().float()


def _rows_rolled(family, w):
    name = family.weight("v_proj", 1)
    w[name] = w[name].roll(1, 0)


def _head(w):
    return next(name for name in w if name in ("classifier.weight", "lm_head.weight"))


def _stale_head(family, w):
    saved = family.adapter.manifest.adapter.modules_to_save
    w[_head(w)] = family.stored[_head(w)] * (1.0 if saved else 0.9)


def _norm(family, w):
    name = next(name for name in sorted(w) if "norm" in name and name.endswith("weight"))
    w[name] = w[name] * 1.01


def _embedding(family, w):
    name = next(n for n in sorted(w) if "embed" in n and w[n].shape[0] > 1)
    w[name] = w[name].flip(0)


def _one_large_bit(family, w):
    flat = w[family.weight("q_proj")].reshape(-1)
    flat[int(flat.abs().argmax())] *= -1


def _nan(family, w):
    w[family.weight("q_proj")].view(-1)[3] = float("nan")


def _infinite(family, w):
    w[_head(w)].view(-1)[0] = float("inf")


MERGED_DEFECTS = [
    _sign, _dropped, _doubled, _doubled_once, _transposed, _root_scaling, _swapped, _duplicated,
    _exchanged_projections, _original_base, _one_layer_on_the_original, _rounded_again,
    _block_off_by_one, _sixteen_bits, _rows_rolled, _stale_head, _norm, _embedding,
    _one_large_bit, _nan, _infinite,
]  # fmt: skip


@pytest.mark.parametrize("defect", MERGED_DEFECTS, ids=lambda item: item.__name__.strip("_"))
def test_a_defect_in_a_merge_is_caught(family, tmp_path, defect):
    path = spoil(family.copy("merged", tmp_path), lambda tensors: defect(family, tensors))
    report = verify(path)
    assert not report.passed
    assert failures(report)


@pytest.mark.parametrize("defect", [_sign, _dropped, _doubled_once, _norm, _nan])
def test_a_defect_in_a_rounded_merge_is_caught_by_its_own_outputs(family, tmp_path, defect):
    def change(tensors):
        wide = {name: tensor.float() for name, tensor in tensors.items()}
        defect(family, wide)
        tensors.update({name: tensor.bfloat16() for name, tensor in wide.items()})

    report = verify(spoil(family.copy("merged16", tmp_path), change))
    assert any(name.startswith("own") for name in failures(report))


def _module(family, leaf, layer=0):
    return next(m for m in family.names if f"layers.{layer}." in m and m.endswith(leaf))


def _key(family, part, leaf="q_proj", layer=0):
    return f"base_model.model.{_module(family, leaf, layer)}.lora_{part}.weight"


def _a_sign(family, w):
    w[_key(family, "B")] *= -1


def _a_dropped(family, w):
    w[_key(family, "B", "o_proj", 1)] *= 0


def _a_doubled(family, w):
    w[_key(family, "A", "v_proj")] *= 2


def _a_swapped(family, w):
    for part in "AB":
        first, second = _key(family, part), _key(family, part, layer=1)
        w[first], w[second] = w[second], w[first]


def _a_permuted(family, w):
    w[_key(family, "A")] = w[_key(family, "A")].flip(0)


@pytest.mark.parametrize("defect", [_a_sign, _a_dropped, _a_doubled, _a_swapped, _a_permuted])
def test_a_defect_in_an_adapter_is_caught(family, tmp_path, defect):
    path = spoil(family.copy("adapter", tmp_path), lambda tensors: defect(family, tensors))
    assert failures(verify(path, base=family.base))


@pytest.mark.parametrize(
    "changes", [{"lora_alpha": 24.0}, {"lora_alpha": 11.99}, {"use_rslora": True}]
)
def test_a_changed_scaling_is_caught(family, tmp_path, changes):
    path = family.copy("adapter", tmp_path)
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | changes))
    seal(path, read_manifest(path)[0])
    assert "reference: relative" in failures(verify(path, base=family.base))


def _packed_name(family):
    return family.weight("q_proj")


def _p_codes(family, w):
    name = _packed_name(family)
    w[name] = w[name].roll(1, 0)


def _p_nibbles(family, w):
    name = _packed_name(family)
    w[name] = (w[name] << 4) | (w[name] >> 4)


def _p_scales(family, w):
    packed = packed_from_entries(w, _packed_name(family))
    wrong = QuantSpec(scheme="nf4", group_size=64, double_quant=True)
    again = quantize_tensor(dequantize_tensor(packed) * 1.05, wrong)
    w.update(packed_entries(again, _packed_name(family)))


def _p_swapped(family, w):
    first, second = family.weight("q_proj", 0), family.weight("q_proj", 1)
    w[first], w[second] = w[second], w[first]


@pytest.mark.parametrize("defect", [_p_codes, _p_nibbles, _p_scales, _p_swapped])
def test_a_defect_in_a_pack_is_caught_by_its_own_outputs(family, tmp_path, defect):
    path = spoil(family.copy("packed", tmp_path), lambda tensors: defect(family, tensors))
    assert any(name.startswith("own") for name in failures(verify(path)))


@pytest.mark.parametrize("kind", ["adapter", "merged", "packed"])
def test_any_flipped_byte_is_corruption(family, tmp_path, kind):
    path = family.copy(kind, tmp_path)
    random = np.random.default_rng(0)
    for file in sorted(path.iterdir()) + 8 * [path / "qlx.json"]:  # the manifest seals itself
        data = bytearray(file.read_bytes())
        at = int(random.integers(len(data)))
        data[at] ^= 1 << int(random.integers(8))
        file.write_bytes(data)
        with pytest.raises(InputRefused) as caught:
            verify(path, base=family.base if kind == "adapter" else None)
        assert caught.value.exit_code == 3, file.name
        data[at] = (family.root / kind / file.name).read_bytes()[at]
        file.write_bytes(data)
    assert verify(path, base=family.base if kind == "adapter" else None).passed


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_missing_or_an_added_file_is_corruption(family, tmp_path, kind):
    path = family.copy(kind, tmp_path)
    (path / "extra.txt").write_text("x")
    with pytest.raises(CorruptCheckpoint, match=r"extra\.txt"):
        verify(path)
    (path / "extra.txt").unlink()
    (path / "config.json").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
        verify(path)


def test_the_wrong_base_is_a_mismatch(family):
    for kind in ("adapter", "merged"):
        with pytest.raises(Mismatch, match="not the base"):
            verify(family.root / kind, base=family.other_base)


def test_a_base_that_is_not_here_is_asked_for(family, tmp_path):
    path = family.copy("adapter", tmp_path)
    manifest = read_manifest(path)[0]
    elsewhere = manifest.base.model_copy(update={"name": "nowhere/to/be/found"})
    seal(path, manifest.model_copy(update={"base": elsewhere}))
    with pytest.raises(InputRefused, match="--base"):
        verify(path)


def test_a_probe_of_another_model_is_caught(family, tmp_path):
    path = family.copy("merged", tmp_path)
    probe = read_probe(path)
    wrong = type(probe)(probe.task, probe.inputs, probe.base, probe.base)
    write_probe(path / "probe.safetensors", wrong)
    seal(path, read_manifest(path)[0])
    assert "reference: relative" in failures(verify(path))


def test_no_probe_is_no_verification(family, tmp_path):
    path = family.copy("merged", tmp_path)
    (path / "probe.safetensors").unlink()
    manifest = read_manifest(path)[0].model_copy(update={"probe": None})
    seal(path, manifest)
    with pytest.raises(InputRefused, match="no probe"):
        verify(path)
    report = verify(path, against=family.merged.path)
    assert report.passed


def test_a_lossy_history_without_own_outputs_is_refused(family, tmp_path):
    path = family.copy("packed", tmp_path)
    probe = read_probe(path)
    write_probe(path / "probe.safetensors", type(probe)(probe.task, probe.inputs, probe.reference))
    seal(path, read_manifest(path)[0])
    with pytest.raises(Mismatch, match="no outputs of its own"):
        verify(path)


def test_limits_can_be_tightened_only(family):
    path = family.merged.path
    assert not verify(path, tighten={"max_abs": 0.0}).passed
    assert verify(path, tighten={"kl_mean": 1e-6}).passed
    with pytest.raises(UsageError, match="looser"):
        verify(path, tighten={"relative": 1.0})


@pytest.mark.parametrize("kind", ["merged16", "packed", "adapter"])
def test_kinds_are_compared_with_each_other(family, kind):
    report = verify(family.merged.path, against=family.root / kind, base=family.base)
    assert report.passed, failures(report)
    back = verify(family.root / kind, against=family.merged.path, base=family.base)
    assert back.passed, failures(back)
    if kind == "adapter":
        assert report.comparisons["against"].relative < 2e-5


@pytest.mark.parametrize("defect", [_sign, _dropped, _swapped])
def test_a_defect_shows_against_another_kind(family, tmp_path, defect):
    path = spoil(family.copy("merged", tmp_path), lambda tensors: defect(family, tensors))
    assert failures(verify(family.root / "adapter", against=path, base=family.base))


def test_probes_of_different_inputs_are_not_compared(family, tmp_path):
    path = family.copy("merged", tmp_path)
    probe = read_probe(path)
    inputs = {name: array[::-1].copy() for name, array in probe.inputs.items()}
    write_probe(path / "probe.safetensors", type(probe)(probe.task, inputs, probe.reference))
    seal(path, read_manifest(path)[0])
    with pytest.raises(Mismatch, match="different inputs"):
        verify(family.merged.path, against=path)


def test_assertions_for_other_peoples_suites(family, tmp_path):
    assert assert_verified(family.merged.path, kl_mean=1e-6).passed
    assert assert_equivalent(family.merged.path, family.root / "packed").passed
    path = spoil(family.copy("merged", tmp_path), lambda tensors: _sign(family, tensors))
    with pytest.raises(AssertionError, match="reference: relative"):
        assert_verified(path)
    with pytest.raises(AssertionError, match="against: relative"):
        assert_equivalent(path, family.merged.path)
