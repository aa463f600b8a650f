"""How adapters begin: PiSSA against PEFT's own, LoftQ against no correction and a random one."""

import copy

import pytest
import torch
from torch import nn

from qlx.adapters import (
    attach_adapter,
    delta_weight,
    frozen_part,
    join_halves,
    load_adapter,
    read_adapter,
    save_adapter,
)
from qlx.adapters.initial import low_rank
from qlx.checkpoint import QuantSpec
from qlx.errors import CheckFailed, Unsupported
from qlx.quant import dequantize_tensor, packed_of_module, quantize_model
from qlx.recipe import AdapterSection
from qlx.training.trainable import parameter_table, require_in_optimizer, require_only_adapter

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SCHEMES = {
    "nf4": {"weight_bits": 4, "group_size": 64, "double_quant": True},
    "fp4": {"weight_bits": 4, "group_size": 64},
    "int8": {"weight_bits": 8},
    "int4": {"weight_bits": 4, "group_size": 32},
    "ternary": {"weight_bits": 2, "group_size": 64},
}
PLAIN = {"rank": 4, "alpha": 6.0, "target_modules": ("up", "down")}
PATTERNS = {"use_rslora": True, "rank_pattern": {"up": 3}, "alpha_pattern": {"down": 2.5}}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)
        self.classifier = nn.Linear(64, 5)

    def forward(self, x):
        return self.classifier(torch.tanh(self.down(torch.tanh(self.up(x)))))


def net(scheme=None):
    torch.manual_seed(0)
    model = Net().requires_grad_(False)
    if scheme is not None:
        quantize_model(model, spec(scheme))
    return model.eval()


def spec(scheme):
    backend = "bitsandbytes" if scheme in ("nf4", "fp4") else "qlx"
    return QuantSpec(method="qlora", scheme=scheme, backend=backend, **SCHEMES[scheme])


def section(**options):
    return AdapterSection(**{**PLAIN, **options})


def inputs(count=32):
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(1))


def losses(model, steps=12):
    """What a short training's loss is at every step."""
    labels = torch.arange(32) % 5
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    found = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(inputs()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


@pytest.mark.parametrize("options", [{}, PATTERNS], ids=["plain", "rslora and patterns"])
def test_pissa_trains_as_pefts_own(options):
    theirs = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["up", "down"],
        init_lora_weights="pissa",
        **options,
    )
    expected = losses(peft.get_peft_model(net(), theirs))
    ours = losses(attach_adapter(net(), section(init_lora_weights="pissa", **options)))
    torch.testing.assert_close(ours, expected, rtol=2e-5, atol=0)
    other = losses(attach_adapter(net(), section(**options)))
    assert (other - expected).abs().max() > 100 * (ours - expected).abs().max()


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4"])
def test_pissa_starts_as_its_base_and_trains_one_half(scheme, start):
    model = net(scheme)
    before = model(inputs())
    adapted = attach_adapter(model, section(init_lora_weights=start, **PATTERNS))
    torch.testing.assert_close(adapted(inputs()), before, rtol=0, atol=2e-6)
    frozen = {name: value.clone() for name, value in frozen_part(adapted).items()}
    assert len(frozen) == 4 and not any(
        value.requires_grad for value in frozen_part(adapted).values()
    )
    require_only_adapter(adapted, section())
    table = parameter_table(adapted)
    assert table.trained == 3 * (64 + 128) + 4 * (128 + 64)
    after = losses(adapted)
    assert after[-1] < after[0]
    assert all(torch.equal(value, frozen[name]) for name, value in frozen_part(adapted).items())


def test_a_frozen_half_that_would_be_trained_is_found():
    adapted = attach_adapter(net(), section(init_lora_weights="pissa"))
    held = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    require_in_optimizer(adapted, held)
    next(iter(frozen_part(adapted).values())).requires_grad_(True)
    with pytest.raises(CheckFailed, match=r"\.start\.weight' of the base would be trained"):
        require_only_adapter(adapted, section())


@pytest.mark.parametrize("options", [{}, PATTERNS], ids=["plain", "rslora and patterns"])
def test_what_is_stored_of_pissa_is_one_lora_of_twice_the_rank(options, tmp_path):
    adapted = attach_adapter(net("int4"), section(init_lora_weights="pissa", **options))
    losses(adapted)
    save_adapter(adapted, tmp_path)
    stored = read_adapter(tmp_path)
    for name in ("up", "down"):
        layer = adapted.get_base_model().get_submodule(name)
        expected = layer.get_delta_weight("default") + layer.get_delta_weight("start")
        delta = stored.deltas[name]
        assert delta.rank == 2 * layer.r["default"]
        assert delta.scaling == pytest.approx(layer.scaling["default"], rel=1e-15)
        torch.testing.assert_close(delta_weight(delta), expected, rtol=0, atol=1e-6)
    theirs = peft.PeftModel.from_pretrained(net("int4"), str(tmp_path)).eval()
    torch.testing.assert_close(theirs(inputs()), adapted(inputs()), rtol=0, atol=2e-6)
    ours = load_adapter(net("int4"), tmp_path)
    assert torch.equal(ours(inputs()), theirs(inputs()))
    apart = adapted(inputs())
    join_halves(adapted.eval())  # as it is scored and probed
    assert not frozen_part(adapted)
    torch.testing.assert_close(adapted(inputs()), apart, rtol=0, atol=2e-6)
    torch.testing.assert_close(adapted(inputs()), ours(inputs()), rtol=0, atol=1e-7)
    with adapted.disable_adapter():
        assert torch.equal(adapted(inputs()), net("int4")(inputs()))
    save_adapter(adapted, tmp_path / "joined")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "joined" / name).read_bytes() == (tmp_path / name).read_bytes()


def weights(model, quantized):
    """The weight of each adapted layer as the adapted model computes with it, adapter included."""
    found = {}
    for name in ("up", "down"):
        layer = model.get_base_model().get_submodule(name)
        base = layer.get_base_layer()
        value = (
            dequantize_tensor(packed_of_module(base), torch.float32) if quantized else base.weight
        )
        found[name] = value + layer.get_delta_weight("default")
    return found


def output_error(model, plain):
    with torch.no_grad():
        return float((model(inputs()) - plain(inputs())).norm() / plain(inputs()).norm())


@pytest.mark.parametrize("options", [{}, PATTERNS], ids=["plain", "rslora and patterns"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_loftq_starts_nearer_to_the_unquantized_model(scheme, options):
    plain = net()
    original = {name: plain.get_submodule(name).weight for name in ("up", "down")}

    def distance(adapted):
        found = weights(adapted, quantized=True)
        return {name: float((found[name] - original[name]).norm()) for name in found}

    ordinary = attach_adapter(net(scheme), section(**options))
    corrected = attach_adapter(
        net(scheme), section(init_lora_weights="loftq", **options), original=original.__getitem__
    )
    assert output_error(corrected, plain) < output_error(ordinary, plain)
    before, after = distance(ordinary), distance(corrected)
    assert all(after[name] < 0.99 * before[name] for name in before)
    shuffled = attach_adapter(
        net(scheme),
        section(init_lora_weights="loftq", **options),
        original=lambda name: original[name].flip(0),
    )
    assert all(far > before[name] for name, far in distance(shuffled).items())
    codes = [packed_of_module(m.get_submodule("up.base_layer")).codes for m in (
        corrected.get_base_model(), ordinary.get_base_model()
    )]  # fmt: skip
    assert torch.equal(*codes)


def test_loftq_is_the_best_correction_of_its_rank():
    plain = net()
    adapted = attach_adapter(
        net("ternary"),
        section(init_lora_weights="loftq"),
        original=lambda name: plain.get_submodule(name).weight,
    )
    layer = adapted.get_base_model().get_submodule("up")
    value = dequantize_tensor(packed_of_module(layer.get_base_layer()), torch.float32)
    lost = plain.up.weight - value
    left = torch.linalg.svdvals(lost - layer.get_delta_weight("default"))
    torch.testing.assert_close(left[:-4], torch.linalg.svdvals(lost)[4:], rtol=1e-4, atol=1e-6)


def test_loftq_leaves_layers_alone_that_lost_nothing():
    model = net("int8")
    kept = {
        name: dequantize_tensor(packed_of_module(model.get_submodule(name)))
        for name in ("up", "down")
    }
    adapted = attach_adapter(model, section(init_lora_weights="loftq"), original=kept.__getitem__)
    layer = adapted.get_base_model().get_submodule("up")
    assert layer.lora_A["default"].weight.any() and not layer.lora_B["default"].weight.any()


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 64)
        self.up = nn.Linear(64, 8)


def test_what_cannot_begin_so_is_refused_with_its_reason():
    for start in ("pissa", "loftq"):
        options = {"target_modules": ("embed",), "init_lora_weights": start}
        with pytest.raises(
            Unsupported, match=f"{start} is for linear layers, and 'embed' is a Emb"
        ):
            attach_adapter(Embedded(), section(**options), original=lambda name: None)
    with pytest.raises(Unsupported, match=r"rank: 65 is more than the 64 directions .* 'up'"):
        attach_adapter(net(), section(rank_pattern={"up": 65}, init_lora_weights="pissa"))
    with pytest.raises(Unsupported, match="no adapted module is quantized"):
        attach_adapter(net(), section(init_lora_weights="loftq"), original=lambda name: None)


def test_the_fast_decomposition_is_near_the_exact_one():
    torch.manual_seed(0)
    matrix = torch.randn(60, 8) @ torch.randn(8, 40) + 0.01 * torch.randn(60, 40)
    exact, fast = (b @ a for a, b in (low_rank(matrix, 8), low_rank(matrix, 8, 4)))
    torch.testing.assert_close(fast, exact, rtol=0, atol=1e-3)
    a, b = low_rank(matrix, 8)
    torch.testing.assert_close(
        a.norm(dim=1), b.norm(dim=0)
    )  # the singular values are shared evenly
    assert (low_rank(matrix, 7)[1] @ low_rank(matrix, 7)[0] - matrix).norm() > 1


def test_models_without_values_are_attached_to_all_the_same():
    """A dry run looks at names and counts only."""
    with torch.device("meta"):
        model = Net()
    for start in ("pissa", "loftq"):
        attach_adapter(
            copy.deepcopy(model), section(init_lora_weights=start), original=lambda _: None
        )
