"""States between layers and weights as they act, against transformers' and PEFT's own."""

import numpy as np
import pytest
import torch

from qlx.checkpoint import resolve_source
from qlx.errors import Unsupported
from qlx.models import load_model
from qlx.models.trace import acting_weights, adapter_off, layer_stack, trace_layers
from tests.adapter_support import FP4, NF4, NONE, TASKS, Case, inputs_for, make_adapter, make_base

CASES = {
    "vit": Case("vit", NF4, options={"modules_to_save": ("classifier",)}),
    "llama": Case("llama", FP4),
    "qwen3-dora": Case("qwen3", NONE, options={"use_dora": True}),
    "gpt2": Case("gpt2", NONE, peft={"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "llama-embedding": Case("llama", NONE, peft={"target_modules": ["embed_tokens", "q_proj"]}),
}


@pytest.fixture(scope="module", params=CASES)
def adapted(request, tmp_path_factory):
    root, case = tmp_path_factory.mktemp(request.param), CASES[request.param]
    base = make_base(root / "base", case.kind)
    adapter = make_adapter(base, root / "adapter", case)
    return case.kind, load_model(adapter, resolve_source(str(base))).eval()


def test_states_are_transformers_hidden_states(adapted):
    kind, model = adapted
    inputs = inputs_for(kind)
    found = trace_layers(model, TASKS[kind], inputs)
    with torch.inference_mode():
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        expected = model(**tensors, output_hidden_states=True)
    states = found.states()
    assert len(states) == 3 == len(found.names) + 1
    for ours, theirs in zip(states[:-1], expected.hidden_states, strict=False):
        np.testing.assert_array_equal(ours, theirs.numpy())
    np.testing.assert_array_equal(found.logits, expected.logits.numpy())


def test_feeding_a_model_its_own_states_changes_nothing_and_others_show(adapted):
    kind, model = adapted
    inputs = inputs_for(kind)
    found = trace_layers(model, TASKS[kind], inputs)
    again = trace_layers(model, TASKS[kind], inputs, fed=found)
    np.testing.assert_array_equal(again.logits, found.logits)
    other = trace_layers(model, TASKS[kind], inputs)
    other.given[1] = other.given[1].flip(-1)
    other.made[1] = other.made[1].flip(-1)
    moved = trace_layers(model, TASKS[kind], inputs, fed=other)
    np.testing.assert_array_equal(moved.states()[1], found.states()[1])  # the first got its own
    assert not np.allclose(moved.states()[2], found.states()[2])
    assert not np.allclose(moved.logits, found.logits)


def test_no_hook_stays_behind(adapted):
    kind, model = adapted
    layers = layer_stack(model).values()
    before = [(len(layer._forward_hooks), len(layer._forward_pre_hooks)) for layer in layers]
    trace_layers(model, TASKS[kind], inputs_for(kind))
    after = [(len(layer._forward_hooks), len(layer._forward_pre_hooks)) for layer in layers]
    assert after == before


def test_weights_as_they_act_are_those_of_peft(adapted):
    _, model = adapted
    weights = acting_weights(model)
    checked = 0
    for name, module in model.base_model.model.named_modules():
        if not hasattr(module, "get_delta_weight") or module.use_dora.get("default"):
            continue
        delta = module.get_delta_weight("default").detach().numpy()
        with adapter_off(model):
            before = weights[f"{name}.weight"]()
        after = weights[f"{name}.weight"]()
        assert np.abs(delta).max() > 1e-3
        np.testing.assert_allclose(after - before, delta, atol=1e-5)
        checked += 1
    dora = any("magnitude" in name for name, _ in model.named_parameters())
    assert checked >= 2 or dora


def test_weights_multiply_as_the_layer_does(adapted):
    _, model = adapted
    weights = acting_weights(model)
    plain = model.base_model.model
    name = next(
        n
        for n, m in plain.named_modules()
        if (hasattr(m, "lora_A") and hasattr(m.base_layer, "in_features")) or n.endswith("c_attn")
    )
    layer, matrix = plain.get_submodule(name), weights[f"{name}.weight"]()
    matrix = matrix if name.endswith("c_attn") else matrix.T
    x = torch.randn(5, matrix.shape[0])
    bias = weights[f"{name}.bias"]() if f"{name}.bias" in weights else 0.0
    with torch.inference_mode():
        expected = layer(x).numpy()
    np.testing.assert_allclose(x.numpy() @ matrix + bias, expected, atol=2e-5)
    assert not np.allclose(x.numpy() @ (matrix * 1.01) + bias, expected, atol=2e-5)


def test_names_are_those_of_the_plain_model(adapted):
    _, model = adapted
    names = set(acting_weights(model))
    assert not any(
        "lora" in name or "base_layer" in name or "modules_to_save" in name for name in names
    )
    with adapter_off(model):
        assert set(acting_weights(model)) == names


def test_too_many_rows_and_other_stacks_are_refused(adapted):
    kind, model = adapted
    inputs = inputs_for(kind, count=20)
    with pytest.raises(Unsupported, match="at most 16 rows"):
        trace_layers(model, TASKS[kind], inputs)
    found = trace_layers(model, TASKS[kind], inputs_for(kind))
    found.names = found.names[:1]
    with pytest.raises(Unsupported, match="different layers"):
        trace_layers(model, TASKS[kind], inputs_for(kind), fed=found)


def test_a_model_that_is_no_stack_is_refused():
    with pytest.raises(Unsupported, match="no stack"):
        layer_stack(torch.nn.Linear(2, 2))
