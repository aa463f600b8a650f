"""LoRA layers that add into the base's output: PEFT's own values and gradients, with fewer arrays."""

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from qlx.adapters.joined import join_products
from qlx.checkpoint import QuantSpec
from qlx.quant import quantize_model

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

BASES = {
    "float": None,
    "nf4": QuantSpec(method="qlora", scheme="nf4", group_size=64, double_quant=True),
    "ternary": QuantSpec(method="qlora", scheme="ternary", group_size=64),
}
NARROW = {
    "float": None,
    "nf4": QuantSpec(
        method="qlora", scheme="nf4", group_size=64, double_quant=True, compute_dtype="bfloat16"
    ),
    "ternary": QuantSpec(method="qlora", scheme="ternary", group_size=64, compute_dtype="bfloat16"),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 128)
        self.second = nn.Linear(128, 64, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def adapted(base="float", dtype=torch.float32, narrow=False, **options):
    """PEFT's model with trained-looking factors and a scaling of 3."""
    torch.manual_seed(0)
    model = Net()
    if spec := (NARROW if narrow else BASES)[base]:
        quantize_model(model, spec)
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["first", "second"], **{"lora_dropout": 0.0, **options}
    )
    found = peft.get_peft_model(model.to(dtype), config)
    torch.manual_seed(1)
    for name, value in found.named_parameters():
        if "lora_" in name:
            nn.init.normal_(value, std=0.2)
    return found


def pair(*args, **options):
    """The same model as PEFT computes it and joined."""
    plain = adapted(*args, **options)
    joined = copy.deepcopy(plain)
    assert join_products(joined) == 2
    return plain, joined


def outcome(model, x, seed=2):
    """Outputs, and gradients of the inputs and of every trained parameter."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = model(x)
    y.square().mean().backward()
    grads = [value.grad for value in model.parameters() if value.requires_grad]
    return [y.detach(), x.grad, *grads]


def distance(ours, theirs):
    assert len(ours) == len(theirs)
    return max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
        for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize("shape", [(7, 64), (2, 5, 64), (0, 64)], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_values_and_gradients_are_pefts(base, shape):
    plain, joined = pair(base)
    x = torch.randn(shape)
    if not x.numel():
        assert joined(x).shape == plain(x).shape
        return
    assert distance(outcome(joined, x), outcome(plain, x)) < 3e-6
    for module in joined.modules():
        if hasattr(module, "scaling"):
            module.scaling["default"] *= 1.001
    assert distance(outcome(joined, x), outcome(plain, x)) > 1e-4


def test_dropout_draws_the_same():
    plain, joined = pair(lora_dropout=0.5)
    x = torch.randn(2, 5, 64)
    assert distance(outcome(joined.train(), x), outcome(plain.train(), x)) < 3e-6
    assert distance(outcome(joined, x, seed=3), outcome(plain, x)) > 1e-3


@pytest.mark.parametrize("case", ["dora", "own bias", "bf16 base", "off", "merged", "two", "eval"])
def test_the_rest_is_left_to_peft(case):
    options = {
        "dora": {"use_dora": True},
        "own bias": {"lora_bias": True},
        "bf16 base": {"dtype": torch.bfloat16},
    }.get(case, {})
    plain, joined = pair(**options)
    x = torch.randn(3, 64, dtype=options.get("dtype", torch.float32))
    if case == "bf16 base":
        for model in (plain, joined):
            for name, value in model.named_parameters():
                if "lora_" in name:
                    value.data = value.data.float()
    if case == "merged":
        plain.merge_adapter()
        joined.merge_adapter()
    if case == "two":
        for model in (plain, joined):
            torch.manual_seed(4)
            model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["first"]))
            model.base_model.set_adapter(["default", "other"])
    if case == "eval":
        # that it is joined shows in the graph; the last bits may be the same
        assert joined(x).grad_fn.name() != plain(x).grad_fn.name()
        joined.eval()
        assert joined(x).grad_fn.name() == plain(x).grad_fn.name()
    if case == "off":
        with plain.disable_adapter(), joined.disable_adapter():
            assert torch.equal(joined(x), plain(x))
        assert not torch.equal(joined(x), joined.get_base_model().second(x.new_zeros(3, 128)))
        return
    assert torch.equal(joined(x), plain(x))


def narrowed(base):
    """PEFT's model on a bfloat16 base with float32 factors, as GPUs train it; and the same joined, and in float32."""
    whole, plain = adapted(base), adapted(base, narrow=True)
    for name, value in plain.named_parameters():
        if value.is_floating_point() and "lora_" not in name:
            value.data = value.data.bfloat16()
            whole.get_parameter(name).data = value.data.float()
    joined = copy.deepcopy(plain)
    assert join_products(joined) == 2
    return whole, plain, joined


@pytest.mark.parametrize("base", NARROW)
def test_autocast_joins_in_the_bases_dtype_no_coarser_than_peft(base):
    whole, plain, joined = narrowed(base)
    x = torch.randn(40, 64).bfloat16()
    wanted = outcome(whole, x.float())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = outcome(joined, x), outcome(plain, x)
        with torch.no_grad():
            assert not torch.equal(ours[0], theirs[0])
            assert torch.equal(joined.eval()(x), plain.eval()(x))
    assert ours[0].dtype == theirs[0].dtype
    assert {grad.dtype for grad in ours[2:]} == {grad.dtype for grad in theirs[2:]}
    error, peers = distance_of_norms(ours, wanted), distance_of_norms(theirs, wanted)
    assert error < 1.1 * peers < 0.02
    for module in joined.modules():
        if hasattr(module, "scaling"):
            module.scaling["default"] *= 1.05
    with torch.autocast("cpu", torch.bfloat16):
        assert distance_of_norms(outcome(joined.train(), x), wanted) > 2 * peers


def distance_of_norms(ours, theirs):
    return max(
        float((a.double() - b).norm() / b.double().norm())
        for a, b in zip(ours, theirs, strict=True)
    )


def test_autocast_casts_all_factors_at_once():
    _, _, joined = narrowed("float")
    layers = [module for module in joined.modules() if hasattr(module, "cast")]
    x = torch.randn(5, 64).bfloat16()
    with Calls() as calls, torch.autocast("cpu", torch.bfloat16):
        y = joined(x)
        assert all(factor.dtype == torch.bfloat16 for layer in layers for factor in layer.cast)
        y.square().mean().backward()
    assert calls.count["aten._foreach_copy_.default"] == 2
    assert calls.count["aten._to_copy.default"] < 4  # of the loss, none a layer


def test_what_was_cast_is_forgotten_before_it_is_stale():
    """Layers called past the model, after a step of an optimizer, and in eval mode."""
    _, _, joined = narrowed("float")
    layers = [module for module in joined.modules() if hasattr(module, "cast")]
    x = torch.randn(5, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        joined(x).square().mean().backward()
        assert [layer.cast for layer in layers] == [None, None]
        with torch.no_grad():
            before = joined.base_model.model(x)
            layers[0].lora_B["default"].weight.mul_(3)
            assert not torch.equal(joined.base_model.model(x), before)
        joined(x)
        assert None not in [layer.cast for layer in layers]
        joined.eval()(x)
    assert [layer.cast for layer in layers] == [None, None]


def test_gradient_checkpointing_finds_the_same_factors_again():
    """The recomputation of a layer, in the backward pass, must save what the first pass saved."""
    _, _, joined = narrowed("float")
    x = torch.randn(5, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = outcome(joined, x)
        joined.zero_grad()
        for module in joined.modules():
            if hasattr(module, "cast"):
                module.forward = partial(checkpoint, module.forward, use_reentrant=False)
        found = outcome(joined, x)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("base", NARROW)
def test_compiled_it_computes_the_same(base):
    """As training.compile does on a GPU, but for the code generator, which takes a minute."""
    _, _, joined = narrowed(base)
    x = torch.randn(40, 64).bfloat16()
    compiled = torch.compile(joined, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        wanted = outcome(joined, x)
        joined.zero_grad()
        found = outcome(compiled, x)
    assert distance_of_norms(found, wanted) < 1e-3
    for module in joined.modules():
        if hasattr(module, "scaling"):
            module.scaling["default"] *= 1.05
    with torch.autocast("cpu", torch.bfloat16):
        assert distance_of_norms(outcome(joined, x), wanted) > 1e-2


@pytest.mark.parametrize("base", NARROW)
def test_autocast_makes_one_array_too(base):
    _, plain, joined = narrowed(base)
    x = torch.randn(30, 64).bfloat16().requires_grad_()
    made = []
    for model in (joined, plain):
        with Arrays(30 * 128) as arrays, torch.autocast("cpu", torch.bfloat16):
            kept = model.get_base_model().first(x)
        made.append(arrays.made)
        assert kept.shape == (30, 128)
    assert made[0] == 1
    assert made[1] > 2


class Calls(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Arrays(TorchDispatchMode):
    """Counts the arrays of a size that operations make."""

    def __init__(self, count):
        super().__init__()
        self.count, self.made, self.seen = count, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() == self.count:
            place = result.untyped_storage().data_ptr()
            self.made += place not in self.seen
            self.seen.add(place)
        return result


@pytest.mark.parametrize("base", ["float", "nf4"])
def test_one_array_of_the_outputs_size_is_made(base):
    plain, joined = pair(base)
    x = torch.randn(30, 64, requires_grad=True)
    made = []
    for model in (joined, plain):
        with Arrays(30 * 128) as arrays:
            kept = model.get_base_model().first(x)
        made.append(arrays.made)
        assert kept.shape == (30, 128)
    assert made[0] == 1
    assert made[1] > 2


def test_other_layers_stay_as_they_are():
    class Stored(nn.Module):
        def __init__(self):
            super().__init__()
            from transformers.pytorch_utils import Conv1D

            self.first, self.second = Conv1D(8, 4), nn.Embedding(4, 4)

    config = peft.LoraConfig(r=2, target_modules=["first", "second"])
    assert join_products(peft.get_peft_model(Stored(), config)) == 0
