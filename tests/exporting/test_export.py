"""Exports of every layout against the torch model they came from, with controls that must fail."""

import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from qlx.checkpoint import open_checkpoint, read_probe, resolve_source, seal, write_probe
from qlx.errors import CheckFailed, InputRefused, Mismatch, Unsupported, UsageError
from qlx.exporting import export_onnx
from qlx.merging import merge
from qlx.models import forward_logits, load_model
from qlx.packing import pack
from qlx.runtime import OnnxPredictor
from qlx.verification import compare, verify
from qlx.weights import read_tensors
from tests.adapter_support import NF4, Case, make_adapter
from tests.onnx_support import merged_checkpoint, tiny_vit

TASKS = ("image-classification", "causal-lm")
SLOW = pytest.mark.exhaustive
LAYOUTS = [("vit", "nf4"), ("llama", "fp4"), ("llama", "none")]


def distance(checkpoint, reference, mask=None):
    """Relative distance of an ONNX checkpoint's outputs on its own probe from `reference`."""
    outputs = OnnxPredictor(checkpoint.path, threads=1).predict(read_probe(checkpoint.path).inputs)
    return compare(reference, outputs, mask).relative


def initializers(checkpoint):
    model = onnx.load(checkpoint.path / "model.onnx")
    return {item.name: onnx.numpy_helper.to_array(item) for item in model.graph.initializer}


@pytest.mark.parametrize("task", TASKS)
def test_an_exported_merged_model_computes_what_torch_computes(exported, merged, task):
    probe = read_probe(exported[task].path)
    assert distance(exported[task], probe.reference, probe.mask) < 1e-5
    assert exported[task].manifest.kind == "onnx"
    (result,) = exported[task].manifest.probe.results
    assert result.passed
    assert result.against == "reference"
    assert result.metrics["relative"] < 1e-5
    assert exported[task].manifest.lineage[-1].parents == (merged[task].digest,)
    assert verify(exported[task].path).passed


@pytest.mark.parametrize("key", LAYOUTS)
def test_an_unmerged_adapter_computes_what_torch_computes(separate, adapters, bases, key):
    model = load_model(adapters[key], resolve_source(str(bases[key[0]])))
    probe = read_probe(adapters[key].path)
    reference = forward_logits(model, adapters[key].manifest.task, probe.inputs)
    assert distance(separate[key], reference, probe.mask) < 1e-5
    assert distance(separate[key], probe.base, probe.mask) > 1e-2
    assert verify(separate[key].path).passed


@pytest.mark.parametrize("key", LAYOUTS)
def test_adapter_and_base_are_separate_named_initializers(separate, adapters, key):
    found = initializers(separate[key])
    modules = adapters[key].manifest.adapter.tensors
    stored = read_tensors(adapters[key].path / "adapter_model.safetensors")
    low_rank = [name for name in modules if any(f".{name}.lora_A" in key for key in stored)]
    assert low_rank
    for module in low_rank:
        a, b = found[f"{module}.lora_A"], found[f"{module}.lora_B"]
        (trained,) = [value for name, value in stored.items() if f".{module}.lora_A" in name]
        np.testing.assert_array_equal(a, trained.numpy().T)
        assert a.shape[1] == b.shape[0]
    quantized = [name for name in found if name.endswith("weight_codes")]
    assert len(quantized) == len(adapters[key].manifest.quantization.modules)


def test_packed_codes_and_scales_are_carried_byte_for_byte(room, merged):
    for scheme in ("nf4", "fp4"):
        packed = pack(
            merged["causal-lm"].path, room / f"packed-{scheme}", to=scheme, min_retention=0
        )
        done = export_onnx(packed, room / f"onnx-packed-{scheme}")
        found, model = initializers(done), load_model(packed)
        modules = packed.manifest.quantization.modules
        assert len(modules) == 14
        for name in modules:
            weight = model.get_submodule(name).weight
            codes = weight.detach().view(torch.uint8).numpy().reshape(-1)
            np.testing.assert_array_equal(found[f"{name}.weight_codes"], codes)
            values = _dequantized(found, name, scheme, weight.quant_state.shape)
            expected = _with_library(weight)
            assert np.abs(values - expected).max() <= 1e-5 * np.abs(expected).max()
        for part, bit in ((f"{name}.weight_codes", 1), (f"{name}.weight_absmax", 2**12)):
            array = found[part].copy()  # negative control: one code, one scale by 0.05 %
            array.view({1: np.uint8, 4: np.uint32}[array.itemsize])[7] ^= bit
            values = _dequantized({**found, part: array}, name, scheme, weight.quant_state.shape)
            assert np.abs(values - expected).max() > 1e-5 * np.abs(expected).max()
        probe = read_probe(done.path)
        assert distance(done, probe.own, probe.mask) < 1e-5
        assert {result.against for result in done.manifest.probe.results} == {"own", "reference"}
        assert done.manifest.quantization == packed.manifest.quantization
        options = done.manifest.lineage[-1].options
        assert options["accuracy_level"] == 0
        assert "levels_rounded" not in options


def _dequantized(found, name, scheme, shape):
    """Level times scale, from what lies in the graph."""
    import bitsandbytes.functional as functional

    codes = found[f"{name}.weight_codes"]
    levels = functional.get_4bit_type(scheme, device="cpu").numpy()
    indices = np.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)
    scales = np.repeat(found[f"{name}.weight_absmax"], 64)
    return (levels[indices] * scales).reshape(shape)


def _with_library(weight):
    import bitsandbytes.functional as functional

    return functional.dequantize_4bit(weight.data, weight.quant_state).float().numpy()


def test_contrib_operators_are_imported_only_where_they_are_used(exported, separate):
    plain = onnx.load(
        exported["image-classification"].path / "model.onnx", load_external_data=False
    )
    assert {item.domain for item in plain.opset_import} == {""}
    packed = onnx.load(separate["llama", "fp4"].path / "model.onnx", load_external_data=False)
    assert {item.domain: item.version for item in packed.opset_import}["com.microsoft"] == 1
    assert "MatMulBnb4" in {node.op_type for node in packed.graph.node if node.domain}


@pytest.mark.parametrize("task", [TASKS[0], pytest.param(TASKS[1], marks=SLOW)])
def test_fp16_halves_the_weights_and_states_its_price(room, merged, exported, task):
    half = export_onnx(merged[task], room / f"onnx-half-{task}", precision="fp16")
    assert weight_bytes(half) < 0.6 * weight_bytes(exported[task])
    (result,) = half.manifest.probe.results
    assert result.against == "reference"
    assert 1e-5 < result.metrics["relative"] < 4e-3
    probe = read_probe(half.path)
    assert distance(half, probe.own, probe.mask) == 0
    assert verify(half.path).passed


def weight_bytes(checkpoint):
    files = checkpoint.manifest.files.items()
    return sum(entry.size for name, entry in files if name.startswith("model.onnx"))


def test_files_lie_flat_and_weights_where_the_task_says(exported):
    image, text = (set(exported[task].manifest.files) for task in TASKS)
    assert image == {"config.json", "model.onnx", "preprocessor_config.json", "probe.safetensors"}
    assert {"model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"} <= text


def test_a_packed_export_is_compared_with_what_the_packed_model_gave(room, merged, tmp_path):
    packed = pack(
        merged["image-classification"].path, tmp_path / "packed", to="nf4", min_retention=0
    )
    probe = read_probe(packed.path)
    write_probe(packed.path / "probe.safetensors", replace(probe, own=probe.own * 1.001))
    seal(packed.path, packed.manifest)
    with pytest.raises(CheckFailed, match=r"own: relative.*run `qlx verify` on the checkpoint"):
        export_onnx(packed.path, tmp_path / "out")


@pytest.mark.parametrize(
    "damage", ["scale", pytest.param("sign", marks=SLOW), pytest.param("layer", marks=SLOW)]
)
def test_a_wrong_export_leaves_no_directory(room, merged, damage, tmp_path):
    """The probe of one model beside the weights of another: what a wrong export would look like."""
    wrong = tiny_vit()
    with torch.no_grad():
        weight = wrong.vit.layers[1].attention.v_proj.weight
        if damage == "sign":
            weight[0] *= -1
        elif damage == "scale":
            weight *= 1.01
        else:
            weight.zero_()
    bad = merged_checkpoint(tmp_path / "bad", "image-classification", wrong)
    write_probe(bad.path / "probe.safetensors", read_probe(merged["image-classification"].path))
    seal(bad.path, bad.manifest)
    with pytest.raises(CheckFailed, match="relative"):
        export_onnx(bad.path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_the_wrong_base_is_refused(adapters, bases, tmp_path):
    with pytest.raises(Mismatch, match="fingerprint"):
        export_onnx(adapters["vit", "nf4"], tmp_path / "out", base=str(bases["llama"]))
    assert not (tmp_path / "out").exists()


def test_an_onnx_checkpoint_is_refused_before_any_work(exported, tmp_path):
    lines = []
    with pytest.raises(InputRefused, match="is ONNX already"):
        export_onnx(exported["causal-lm"], tmp_path / "out", report=lines.append)
    assert lines == []
    assert not (tmp_path / "out").exists()


def test_dora_is_refused_unmerged_with_the_reason_and_exported_merged(bases, tmp_path):
    case = Case("vit", NF4, options={"use_dora": True})
    adapter = make_adapter(bases["vit"], tmp_path / "dora", case)
    with pytest.raises(Unsupported, match="DoRA rescales"):
        export_onnx(adapter, tmp_path / "out", base=str(bases["vit"]))
    assert not (tmp_path / "out").exists()
    done = merge(str(bases["vit"]), [adapter.path], tmp_path / "merged")
    probe = read_probe(export_onnx(done, tmp_path / "out").path)
    assert distance(open_checkpoint(tmp_path / "out"), probe.reference) < 1e-5


def test_a_precision_that_does_not_fit_is_refused(merged, adapters, tmp_path):
    with pytest.raises(Unsupported, match="pack --to nf4"):
        export_onnx(merged["causal-lm"], tmp_path / "out", precision="nf4")
    with pytest.raises(Unsupported, match="fp4"):
        export_onnx(adapters["llama", "fp4"], tmp_path / "out", precision="fp32")
    with pytest.raises(UsageError, match="int3"):
        export_onnx(merged["causal-lm"], tmp_path / "out", precision="int3")


def test_an_existing_directory_is_replaced_only_by_force(exported, merged, tmp_path):
    shutil.copytree(exported["image-classification"].path, tmp_path / "out")
    with pytest.raises(UsageError, match="--force"):
        export_onnx(merged["image-classification"], tmp_path / "out")
    again = export_onnx(merged["image-classification"], tmp_path / "out", force=True)
    assert again.digest == exported["image-classification"].digest
