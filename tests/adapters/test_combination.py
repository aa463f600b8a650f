"""Combining adapters, against PEFT's own `add_weighted_adapter`."""

import pytest
import torch
from torch import nn

from qlx.adapters import METHODS, PRUNING, LoraDelta, combined_delta, delta_weight
from qlx.adapters.formula import delta_energy
from qlx.errors import Mismatch, UsageError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

WEIGHTS = {"both add": (0.7, 1.6), "one subtracts": (1.3, -0.4)}


class Net(nn.Module):
    def __init__(self):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.linear = nn.Linear(16, 24)
        self.only_first = nn.Linear(16, 8)
        self.stored = Conv1D(24, 16)
        self.conv = nn.Conv2d(3, 8, 3)


MODULES = ("embed", "linear", "only_first", "stored", "conv")


def two_adapters(ranks=(4, 4)):
    """A PEFT model with adapters `one` and `two`, and the same as deltas by module."""
    torch.manual_seed(0)
    targets = {"one": MODULES, "two": [m for m in MODULES if m != "only_first"]}
    model = None
    for (name, modules), rank, alpha in zip(targets.items(), ranks, (12, 6), strict=True):
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(modules))
        if model is None:
            model = peft.get_peft_model(Net(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    return model, {
        m: [delta(model, m, name) for name in targets if m in targets[name]] for m in MODULES
    }


def delta(model, module, name):
    layer = model.base_model.model.get_submodule(module)
    embedding = name in layer.lora_embedding_A
    kind = "embedding" if embedding else "conv2d" if module == "conv" else "linear"
    a = layer.lora_embedding_A[name] if embedding else layer.lora_A[name].weight
    b = layer.lora_embedding_B[name] if embedding else layer.lora_B[name].weight
    return LoraDelta(
        module,
        a.detach(),
        b.detach(),
        layer.scaling[name],
        kind=kind,
        fan_in_fan_out=module == "stored",
    )


def by_shape(chances, generator=None):
    """Masks that depend on the shape alone, so that PEFT and qlx draw the same ones."""
    source = torch.Generator().manual_seed(chances.numel())
    return (torch.rand(chances.shape, generator=source) < chances).float()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_what_peft_gives(monkeypatch, method, weights):
    monkeypatch.setattr(torch, "bernoulli", by_shape)
    ranks = (4, 6) if method in ("cat", "svd") else (4, 4)
    model, deltas = two_adapters(ranks)
    factors = list(WEIGHTS[weights])
    model.add_weighted_adapter(
        ["one", "two"], factors, "both", combination_type=method, density=0.4
    )
    for module, parts in deltas.items():
        wanted = model.base_model.model.get_submodule(module).get_delta_weight("both")
        ours = combined_delta(parts, factors[: len(parts)], method, density=0.4, rank=max(ranks))
        assert ours.scaling == 1
        found = delta_weight(ours)
        assert found.shape == wanted.shape
        assert (found - wanted).norm() / wanted.norm() < 2e-6, module


def test_cat_is_the_exact_sum_and_linear_is_not():
    _, deltas = two_adapters()
    parts = deltas["linear"]
    exact = sum(w * delta_weight(d).double() for w, d in zip((0.7, 1.6), parts, strict=True))
    for method, near in (("cat", True), ("linear", False)):
        found = delta_weight(combined_delta(parts, (0.7, 1.6), method)).double()
        assert (((found - exact).norm() / exact.norm()).item() < 1e-6) is near


def test_svd_is_the_best_of_its_rank_and_exact_at_the_sum_of_ranks():
    _, deltas = two_adapters()
    for module in ("linear", "conv", "embed"):
        exact = combined_delta(deltas[module], (1.0, 1.0), "cat")
        whole = combined_delta(deltas[module], (1.0, 1.0), "svd", rank=8)
        cut = combined_delta(deltas[module], (1.0, 1.0), "svd", rank=5)
        assert (whole.rank, cut.rank) == (8, 5)
        total = delta_weight(exact)
        assert (delta_weight(whole) - total).norm() / total.norm() < 1e-5
        lost = torch.linalg.svdvals(total.flatten(1).double())[5:].norm()
        if module != "embed":
            assert (delta_weight(cut) - total).norm().item() == pytest.approx(lost.item(), rel=1e-4)


def test_the_same_seed_draws_the_same_and_keeps_the_expectation():
    _, deltas = two_adapters()
    part = deltas["linear"][:1]

    def drawn(seed):
        source = torch.Generator().manual_seed(seed)
        return combined_delta(part, (1.0,), "dare_linear", density=0.5, generator=source)

    assert torch.equal(drawn(1).a, drawn(1).a)
    assert not torch.equal(drawn(1).a, drawn(2).a)
    mean = torch.stack([drawn(seed).b for seed in range(300)]).mean(0)
    scale = (part[0].scaling) ** 0.5
    assert (mean - part[0].b * scale).abs().mean() < 0.15 * (part[0].b * scale).abs().mean()


def test_density_one_prunes_nothing():
    _, deltas = two_adapters()
    wanted = delta_weight(combined_delta(deltas["linear"], (0.7, 1.6), "linear"))
    for method in ("dare_linear", "magnitude_prune"):
        assert method in PRUNING
        found = delta_weight(combined_delta(deltas["linear"], (0.7, 1.6), method, density=1.0))
        assert torch.equal(found, wanted)


def test_factors_of_different_ranks_are_not_added():
    _, deltas = two_adapters((4, 6))
    with pytest.raises(Mismatch, match="ranks 4, 6"):
        combined_delta(deltas["linear"], (1.0, 1.0), "linear")
    with pytest.raises(UsageError, match="mean"):
        combined_delta(deltas["linear"], (1.0, 1.0), "mean")


def test_the_energy_of_a_delta_is_that_of_its_weight():
    _, deltas = two_adapters()
    for found in deltas.values():
        for delta in found:
            weight = delta_weight(delta).double()
            assert delta_energy(delta) == pytest.approx(float(weight.square().sum()), rel=1e-5)
