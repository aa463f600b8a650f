"""The parts of healing: compensation on every grid, the model run by layers, tuning."""

from pathlib import Path

import pytest
import torch

from qlx.checkpoint import QuantSpec
from qlx.errors import InputRefused
from qlx.models import load_base
from qlx.packing.healing.blocks import LayeredModel
from qlx.packing.healing.compensate import compensated, output_retention
from qlx.packing.healing.grids import grid_of, levels_of, on_grid, scales_of, with_parts
from qlx.packing.healing.paged import Pages, release
from qlx.packing.healing.tune import PackedLayer, divergence_of
from qlx.packing.source import WholeWeights
from qlx.quant import dequantize_tensor, fitted_ternary, quantize_tensor
from qlx.verification import compare
from qlx.weights import open_weights
from tests.adapter_support import TASKS, inputs_for, make_base

SPECS = {
    "int8": QuantSpec(scheme="int8", group_size=None, symmetric=True),
    "int4": QuantSpec(scheme="int4", group_size=32, symmetric=True),
    "int4 rows": QuantSpec(scheme="int4", group_size=None, symmetric=True),
    "int4 bf16": QuantSpec(scheme="int4", group_size=32, extras={"scale_dtype": "bfloat16"}),
    "ternary": QuantSpec(scheme="ternary", group_size=32, symmetric=True),
    "ternary whole": QuantSpec(scheme="ternary", group_size=None, symmetric=True),
    "nf4": QuantSpec(scheme="nf4", group_size=64, double_quant=True),
    "fp4": QuantSpec(scheme="fp4", group_size=64),
}
NAMES = list(SPECS)


@pytest.fixture
def layer():
    """A weight, and the products of inputs that lie in few directions, as real ones do."""
    torch.manual_seed(0)
    inputs = torch.randn(400, 24) @ torch.randn(24, 128) + 0.3 * torch.randn(400, 128)
    return torch.randn(48, 128) / 8, inputs.T @ inputs / len(inputs)


def lost(weight, packed, hessian):
    """The squared error of a layer's outputs."""
    error = dequantize_tensor(packed, torch.float32) - weight
    return float(((error @ hessian) * error).sum())


def rounded(weight, spec):
    packed = quantize_tensor(weight, spec)
    return fitted_ternary(packed, weight) if spec.scheme == "ternary" else packed


# --- Compensation


@pytest.mark.parametrize("name", NAMES)
def test_compensation_keeps_outputs_that_rounding_loses_if_the_inputs_are_the_layers_own(
    layer, name
):
    weight, hessian = layer
    other = hessian[torch.randperm(128)][:, torch.randperm(128)]
    other = other @ other.T / 128  # the inputs of some other layer
    own, wrong = (compensated(weight, h, SPECS[name]).packed for h in (hessian, other))
    plain = lost(weight, rounded(weight, SPECS[name]), hessian)
    assert lost(weight, own, hessian) < 0.6 * plain
    assert lost(weight, wrong, hessian) > 1.5 * lost(weight, own, hessian)


@pytest.mark.parametrize("name", NAMES)
def test_positions_round_to_the_levels_and_parts_make_the_weight_again(layer, name):
    placed = compensated(*layer, SPECS[name])
    packed, grid = placed.packed, grid_of(SPECS[name].scheme)
    chosen = levels_of(packed)
    assert torch.equal(on_grid(chosen, scales_of(packed)), packed.values())
    again = with_parts(packed, chosen)
    assert torch.equal(again.codes, packed.codes)
    assert set(chosen.unique().tolist()) <= set(grid.levels.tolist())
    if grid.even:  # positions of uneven levels are kept to within half a step of theirs only
        away = placed.positions() - chosen
        assert float(away.abs().max()) <= 0.5
        assert float((grid.rounded(placed.positions()) != chosen).float().mean()) < 0.01


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_4_bit_scales_stay_those_of_the_codec(layer, name):
    weight, hessian = layer
    packed, plain = compensated(weight, hessian, SPECS[name]).packed, rounded(weight, SPECS[name])
    assert torch.equal(packed.absmax, plain.absmax)
    assert not torch.equal(packed.codes, plain.codes)


def test_inputs_that_are_unrelated_leave_nothing_to_compensate(layer):
    weight, _ = layer
    placed = compensated(weight, torch.eye(128), SPECS["int4"])
    scales = placed.packed.scales.repeat_interleave(32, dim=1)
    assert torch.equal(levels_of(placed.packed), (weight / scales).round().clamp(-8, 7))


def test_inputs_that_never_come_and_too_few_rows_are_no_obstacle(layer):
    weight, _ = layer
    few = torch.randn(3, 128)
    few[:, 5] = 0
    for hessian in (few.T @ few, torch.zeros(128, 128)):
        assert bool(
            torch.isfinite(compensated(weight, hessian, SPECS["ternary"]).packed.values()).all()
        )
    with pytest.raises(InputRefused, match="not finite"):
        compensated(weight, torch.full((128, 128), torch.nan), SPECS["int4"])


def test_output_retention_tells_noise_from_effect(layer):
    weight, hessian = layer
    base = weight + torch.randn(48, 2) @ torch.randn(2, 128)
    small, large = (
        output_retention(base, weight, compensated(weight, hessian, SPECS[n]).packed, hessian)
        for n in ("ternary", "int8")
    )
    assert small < large <= 1
    assert large > 0.9999
    assert output_retention(weight, weight, rounded(weight, SPECS["int4"]), hessian) is None


# --- The model by layers


@pytest.mark.parametrize("kind", ["llama", "vit", "vitpose", "gemma3_text", "qwen3"])
def test_a_model_run_by_layers_is_the_model(tmp_path, kind):
    path, task = make_base(tmp_path / kind, kind), TASKS[kind]
    batch = {name: torch.from_numpy(values) for name, values in inputs_for(kind).items()}
    weights = WholeWeights(open_weights(path), None, None)
    model = LayeredModel(weights, path, task, tmp_path / "maps")
    with torch.no_grad():
        state = model.entering(batch)
        for at in range(len(model.layers)):
            with model.filled(at) as layer:
                before, state = state, model.leaving(at, batch, state)
            assert all(item.is_meta for item in layer.parameters())
        result = load_base(path, task)(**batch)
        wanted = result.heatmaps if task == "heatmap" else result.logits
        assert torch.allclose(model.finished(batch, state), wanted, atol=1e-5)
        assert not torch.allclose(model.finished(batch, before), wanted, atol=1e-2)
        model.fill_all(except_for=())
        assert torch.allclose(model.outputs(batch), wanted, atol=1e-5)


# --- Tuning


@pytest.mark.parametrize("name", ["int4", "ternary whole", "nf4"])
def test_the_gradients_of_a_packed_layer_are_those_of_its_formula(tmp_path, layer, name):
    torch.manual_seed(1)
    placed = compensated(*layer, SPECS[name])
    packed = PackedLayer(placed, None, None, "layer", Pages(tmp_path))
    generator = torch.Generator().manual_seed(0)
    packed.learn(4, generator)
    with torch.no_grad():
        packed.up.normal_(std=0.2)
    inputs = torch.randn(2, 3, 128, requires_grad=True)
    direction = torch.randn(2, 3, 48)
    (packed(inputs) * direction).sum().backward()
    logs = torch.zeros_like(packed.scales, requires_grad=True)
    down, up = (part.detach().clone().requires_grad_() for part in (packed.down, packed.up))
    again = inputs.detach().clone().requires_grad_()
    positions = packed.placed.positions() + up @ down
    through = positions * packed.grid.inside(positions)
    level = packed.grid.rounded(positions).detach() + through - through.detach()
    values = on_grid(level, packed.scales * logs.exp())
    (torch.nn.functional.linear(again, values) * direction).sum().backward()
    pairs = [(inputs, again), (packed.down, down), (packed.up, up)]
    pairs += [(packed.logs, logs)] if packed.scalable else []
    for ours, theirs in pairs:
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "vit", "gemma3_text"])
def test_gradients_one_layer_at_a_time_are_those_of_the_whole_model(tmp_path, kind):
    path, task = make_base(tmp_path / kind, kind), TASKS[kind]
    batch = {name: torch.from_numpy(values) for name, values in inputs_for(kind).items()}
    model = LayeredModel(WholeWeights(open_weights(path), None, None), path, task, tmp_path / "m")
    model.fill_all(except_for=())
    generator, packed = torch.Generator().manual_seed(0), {}
    inside = [n for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)]
    for name in [n for n in inside if any(n.startswith(f"{path}.") for path in model.stack)]:
        linear = model.model.get_submodule(name)
        placed = compensated(linear.weight.data, torch.eye(linear.in_features), SPECS["int4"])
        packed[name] = PackedLayer(placed, linear.bias, None, name, model.pages)
        packed[name].learn(4, generator)
        packed[name].up.data.normal_(std=0.05, generator=generator)
        model.model.set_submodule(name, packed[name])
    mask = batch["attention_mask"].bool() if "attention_mask" in batch else None
    reference, other = (torch.randn_like(model.outputs(batch)) for _ in range(2))

    def gradients(run):
        for parameter in model.model.parameters():
            parameter.grad = None
        run()
        return [p.grad.clone() for p in model.model.parameters() if p.requires_grad]

    def layered(wanted):
        order = []

        def run():
            model.learn(batch, lambda made: divergence_of(wanted, made, mask), order.append)

        found = gradients(run)
        assert order == list(reversed(range(len(model.layers))))
        return found

    def whole():
        divergence_of(reference, model.model(**batch).logits, mask).backward()

    expected, found, wrong = gradients(whole), layered(reference), layered(other)
    assert len(expected) == 3 * len(packed)
    for one, two, three in zip(expected, found, wrong, strict=True):
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-7)
        assert not torch.allclose(one, three, rtol=1e-1, atol=1e-7)


def test_what_rests_in_files_comes_back_and_memory_is_given_back(tmp_path):
    def resident():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) * 1024

    pages = Pages(tmp_path)
    tensor = pages.zeros("a", (2048, 2048)).fill_(3.0)
    plain = torch.full((4,), 5.0)
    before = resident()
    release([tensor, plain])
    assert before - resident() > 0.9 * tensor.nbytes
    assert float(tensor.sum()) == 3.0 * tensor.numel()
    assert float(plain.sum()) == 20.0
    again = pages.keep("a", torch.ones(2048, 2048))
    assert again.data_ptr() == tensor.data_ptr()
    with pytest.raises(OSError, match=r"."):
        pages.zeros("too large", (2**50,))


def test_the_divergence_is_that_of_the_reports():
    reference, outputs = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    mask = torch.rand(3, 5) < 0.6
    wanted = compare(reference.numpy(), outputs.numpy(), mask.numpy()).kl_mean
    assert float(divergence_of(reference, outputs, mask)) == pytest.approx(wanted, rel=1e-5)
    heat = torch.randn(2, 2, 4, 3), torch.randn(2, 2, 4, 3)
    wanted = compare(*(item.numpy() for item in heat)).kl_mean
    assert float(divergence_of(*heat, None)) == pytest.approx(wanted, rel=1e-5)
