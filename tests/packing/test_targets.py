"""int8, int4, int2 and ternary: the gate, the layouts, and plain transformers loading what was written."""

import json
import os

import pytest
import torch

from qlx.checkpoint import QuantSpec
from qlx.errors import CheckFailed, UsageError
from qlx.merging import merge
from qlx.packing import WHOLE, pack
from qlx.quant import dequantize_tensor, packed_fingerprint, quantize_tensor, stored_quantization
from qlx.verification import verify
from qlx.weights import read_tensors
from tests import adapter_support
from tests.adapter_support import NF4, Case, flip_rows, make_adapter, make_base
from tests.coded_support import coded_base
from tests.isolation import DISTANCE, run_without
from tests.packing.test_pack import PLAIN_BITSANDBYTES

TERNARY = QuantSpec(
    method="qlora", weight_bits=2, scheme="ternary", group_size=None, symmetric=True, backend="qlx"
)
KINDS = ["vit", "llama"]


@pytest.fixture(scope="module")
def on_grid(tmp_path_factory, bases):
    """Adapters on a ternary base, of each kind, whose effect a ternary grid can hold."""
    root = tmp_path_factory.mktemp("grid")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter_support, "draw", flip_rows)
        return {k: make_adapter(bases[k], root / k, Case(k, TERNARY)) for k in KINDS}


@pytest.fixture(scope="module")
def packed(tmp_path_factory, bases, merged, on_grid):
    """Every target and grouping of both kinds, packed: {(kind, target, group size): checkpoint}."""
    root = tmp_path_factory.mktemp("packed")
    made = {}
    for kind in KINDS:
        for to, group in [("int8", None), ("int8", 32), ("int4", None), ("int4", WHOLE)]:
            made[kind, to, group] = pack(
                merged[kind].path,
                root / f"{kind}-{to}-{group}",
                to=to,
                group_size=group,
                base=bases[kind],
                min_retention=0.8,
            )
        for group in (32, WHOLE):
            made[kind, "int2", group] = pack(
                merged[kind].path,
                root / f"{kind}-int2-{group}",
                to="int2",
                group_size=group,
                base=bases[kind],
                min_retention=0,
            )
        for group in (32, WHOLE):
            made[kind, "ternary", group] = pack(
                on_grid[kind].path,
                root / f"{kind}-ternary-{group}",
                to="ternary",
                group_size=group,
                base=bases[kind],
                min_retention=0,
            )
    return made


def test_a_large_delta_survives_and_every_result_verifies(packed):
    for (_, to, group), checkpoint in packed.items():
        report = verify(checkpoint.path)
        assert report.passed
        assert report.comparisons["own"].relative <= 1e-4
        kept = report.comparisons["reference"].retention
        options = checkpoint.manifest.lineage[-1].options
        assert options["group_size"] == group or group is None
        if to != "int2" and (to, group) != ("ternary", 32):
            assert options["weight_retention"] > 0.98
            assert kept > (0.99 if to == "int8" else 0.8)


def test_what_lies_on_the_ternary_grid_survives_whole(packed):
    for kind in KINDS:
        options = packed[kind, "ternary", WHOLE].manifest.lineage[-1].options
        assert options["worst_weight_retention"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("to", "size", "quant"), [("int4", 0.02, NF4), ("int8", 0.0005, NF4), ("ternary", 0.1, TERNARY)]
)
def test_a_delta_below_a_step_fails_the_gate_and_leaves_nothing(
    tmp_path, bases, kind, to, size, quant
):
    adapter = make_adapter(bases[kind], tmp_path / "adapter", Case(kind, quant, size=size))
    group = WHOLE if to == "ternary" else None
    with pytest.raises(CheckFailed, match=r"retention .* \(limit ≥ 0.9\)") as caught:
        pack(adapter.path, tmp_path / "packed", to=to, group_size=group, base=bases[kind])
    assert "keep the adapter separate" in str(caught.value)
    assert not [name for name in os.listdir(tmp_path) if "packed" in name]


def test_less_than_nothing_is_refused_whatever_the_gate(tmp_path, bases, merged):
    """A model that was not trained on ternary weights may come out further away than its base."""
    with pytest.raises(CheckFailed, match=r"retention -\d.*choose more bits") as caught:
        pack(merged["vit"].path, tmp_path / "p", to="ternary", base=bases["vit"], min_retention=0)
    assert "lower --min-retention" not in str(caught.value)


def test_codes_are_those_of_the_codec_and_the_rest_is_untouched(merged, packed):
    for (kind, to, _), checkpoint in packed.items():
        spec, after = checkpoint.manifest.quantization, read_tensors(checkpoint.path)
        stored = stored_quantization(json.loads((checkpoint.path / "config.json").read_text()))
        found = {name: stored.read(after, name) for name in spec.tensors}
        assert spec.fingerprint == packed_fingerprint(found.items())
        if to == "ternary":
            continue
        before = read_tensors(merged[kind].path)
        for name, item in found.items():
            wanted = quantize_tensor(before[name], spec)
            assert all(torch.equal(*pair) for pair in zip(item.parts, wanted.parts, strict=True))
        others = set(before) - set(spec.tensors)
        assert all(torch.equal(after[name], before[name]) for name in others)


PLAIN = (
    "import os\nos.environ['TORCHDYNAMO_DISABLE'] = '1'\nimport transformers\n"
    + DISTANCE
    + """
import hashlib
result = {}
for path in argv:
    model = plain_model(path)
    far = distance(model, path, "own")
    weights = {n: p.float().numpy().tobytes() for n, p in model.state_dict().items() if p.ndim == 2}
    result[path] = [far, {n: hashlib.sha256(b).hexdigest() for n, b in weights.items()}]
"""
)


def digest(tensor):
    from hashlib import sha256

    return sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def test_plain_transformers_gives_our_outputs_and_our_values_bit_for_bit(packed):
    found = run_without(("qlx", "peft", "bitsandbytes"), PLAIN, *(p.path for p in packed.values()))
    assert len(found) == len(packed)
    layouts = set()
    for checkpoint in packed.values():
        relative, digests = found[str(checkpoint.path)]
        spec, after = checkpoint.manifest.quantization, read_tensors(checkpoint.path)
        # a sum that differs in its last bit rounds another way where inputs are rounded to 8 bits
        assert relative < (1e-2 if spec.activation_bits else 1e-4), checkpoint.path
        layouts.add(spec.backend)
        stored = stored_quantization(json.loads((checkpoint.path / "config.json").read_text()))
        for module, name in zip(spec.modules, spec.tensors, strict=True):
            ours = stored.read(after, name)
            values = ours.integers() if spec.backend == "bitnet" else dequantize_tensor(ours)
            assert digests[f"{module}.weight"] == digest(values)
            assert digests[f"{module}.weight"] != digest(-values)
    assert layouts == {"compressed-tensors", "bitnet"}


def test_a_sign_changed_in_the_file_changes_what_plain_transformers_gives(tmp_path, packed):
    """The distance above would tell."""
    import shutil

    from qlx.weights import write_tensors

    path = shutil.copytree(packed["llama", "int4", None].path, tmp_path / "changed")
    tensors = read_tensors(path)
    tensors["model.layers.0.mlp.up_proj.weight_scale"][:8] *= -1
    write_tensors(path / "model.safetensors", tensors, metadata={"format": "pt"})
    assert run_without(("qlx",), PLAIN, path)[str(path)][0] > 1e-2


def test_the_same_model_in_16_bits_has_scales_of_16_bits(tmp_path, merged, bases):
    half = merge(bases["llama"], [merged["llama"].path.parent / "llama-adapter"], tmp_path / "m",
                 dtype="bfloat16")  # fmt: skip
    made = pack(half.path, tmp_path / "p", to="int4", min_retention=0.5)
    spec, after = made.manifest.quantization, read_tensors(made.path)
    assert spec.extras["scale_dtype"] == "bfloat16"
    assert after["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16
    assert verify(made.path).passed


def test_only_bitnet_rounds_inputs_and_is_replayed_so(packed):
    rounded = {
        key: p.manifest.quantization.activation_bits
        for key, p in packed.items()
        if p.manifest.quantization.activation_bits
    }
    assert rounded == {("llama", "ternary", WHOLE): 8}


@pytest.mark.parametrize(("to", "group"), [("int4", None), ("int2", 32), ("ternary", 32)])
def test_a_packed_directory_is_a_base(tmp_path, packed, to, group):
    base = packed["llama", to, group].path
    stored = stored_quantization(json.loads((base / "config.json").read_text())).spec()
    adapter = make_adapter(base, tmp_path / "adapter", Case("llama", stored))
    whole = merge(base, [adapter.path], tmp_path / "merged")
    assert verify(whole.path).passed


@pytest.mark.parametrize(
    ("to", "options", "says"),
    [
        ("int3", {}, "nf4, fp4, int8, int4, int2, ternary"),
        ("int4", {"group_size": 48}, "int4 takes one of 32, 64, .* or whole"),
        ("nf4", {"group_size": WHOLE}, "nf4 takes one of"),
        ("int4", {"double_quant": True}, "int4 has no scales of 8 bits"),
    ],
)
def test_options_that_a_target_does_not_take_are_refused(tmp_path, merged, to, options, says):
    with pytest.raises(UsageError, match=says):
        pack(merged["vit"].path, tmp_path / "p", to=to, **options)
    assert not os.listdir(tmp_path)


THEORY = {
    ("int8", None): 8 + 32 / 64,  # a row of 64 or 128 shares a scale here
    ("int8", 32): 8 + 32 / 32,
    ("int4", None): 4 + 32 / 64,
    ("int2", 32): 2 + 32 / 32 + 2 / 32,
    ("ternary", 32): 2 + 32 / 32,
}


@pytest.mark.parametrize("case", THEORY)
def test_sizes_are_those_of_theory(packed, case):
    checkpoint = packed["llama", *case]
    spec, after = checkpoint.manifest.quantization, read_tensors(checkpoint.path)
    stems = [name.removesuffix("weight") for name in spec.tensors]
    parts = ("weight_packed", "weight_scale", "weight_zero_point")
    size = sum(after[s + part].nbytes for s in stems for part in parts if s + part in after)
    weights = sum(int(after[s + "weight_shape"].prod()) for s in stems)
    assert THEORY[case] - 0.13 < 8 * size / weights <= THEORY[case]


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_an_adapter_on_a_base_in_codes_is_packed_to_another_layout(tmp_path, kind):
    base, _ = coded_base(tmp_path / "base", kind)
    stored = stored_quantization(json.loads((base / "config.json").read_text())).spec()
    adapter = make_adapter(base, tmp_path / "adapter", Case("llama", stored))
    made = pack(adapter.path, tmp_path / "p", to="int8", base=base)
    assert verify(made.path).passed
    section = json.loads((made.path / "config.json").read_text())["quantization_config"]
    assert section["quant_method"] == "compressed-tensors"
    assert not [name for name in read_tensors(made.path) if name.endswith("qweight")]


def test_biases_and_tied_heads_load_in_plain_transformers(tmp_path):
    """Biases keep ternary codes out of BitNet's layout; a tied head is no linear layer to pack."""
    made = []
    for kind, tied, to, group in [("qwen2", False, "ternary", WHOLE), ("qwen3", True, "int4", 32)]:
        base = make_base(tmp_path / f"{kind}-base", kind, tied=tied)
        with pytest.MonkeyPatch.context() as patch:
            if to == "ternary":
                patch.setattr(adapter_support, "draw", flip_rows)
            quant = TERNARY if to == "ternary" else NF4
            adapter = make_adapter(base, tmp_path / f"{kind}-a", Case(kind, quant))
        target = tmp_path / kind
        made.append(pack(adapter.path, target, to=to, group_size=group, base=base, min_retention=0))
        assert made[-1].manifest.quantization.backend == "compressed-tensors"
    found = run_without(("qlx", "peft", "bitsandbytes"), PLAIN, *(item.path for item in made))
    assert max(relative for relative, _ in found.values()) < 1e-4


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "to",
    [
        "nf4",
        pytest.param("int4", marks=pytest.mark.xfail(
            reason="transformers' ViTPose initializes weights that compressed layers do not have",
            raises=AssertionError, strict=True,
        )),
    ],
)  # fmt: skip
def test_heatmap_models_load_in_plain_transformers(tmp_path, to):
    base = make_base(tmp_path / "base", "vitpose")
    adapter = make_adapter(base, tmp_path / "a", Case("vitpose", NF4))
    made = pack(adapter.path, tmp_path / to, to=to, base=base, min_retention=0)
    assert verify(made.path).passed
    code, blocked = (PLAIN, ("bitsandbytes",)) if to == "int4" else (PLAIN_BITSANDBYTES, ())
    ((first, second),) = run_without(("qlx", "peft", *blocked), code, made.path).values()
    assert (first if to == "int4" else second) < 1e-4
