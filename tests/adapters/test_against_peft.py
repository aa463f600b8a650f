"""Reading, merging, attaching and saving, against PEFT's own adapters and its own forward."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from qlx.adapters import (
    adapted_modules,
    adapter_spec,
    attach_adapter,
    auto_targets,
    delta_bias,
    fitted,
    load_adapter,
    merged_weight,
    parameter_counts,
    read_adapter,
    save_adapter,
)
from qlx.checkpoint import QuantSpec
from qlx.errors import CorruptCheckpoint, InputRefused, Mismatch, Unsupported
from qlx.quant import dequantize_tensor, packed_of_module, quantize_model
from qlx.recipe import AdapterSection
from qlx.weights import read_tensors, write_tensors

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Conv1D(nn.Module):
    """A linear layer whose weight is stored as [in, out], as in GPT-2."""

    def __init__(self, out, inp):
        super().__init__()
        from transformers.pytorch_utils import Conv1D as Stored

        self.c_attn = Stored(out, inp)

    def forward(self, x):
        return self.c_attn(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 64)
        self.q_proj = nn.Linear(64, 96)
        self.k_proj = nn.Linear(96, 64, bias=False)
        self.conv = nn.Conv2d(1, 6, 3)
        self.norm = nn.LayerNorm(64)
        self.classifier = nn.Linear(64, 5)

    def forward(self, ids):
        h = self.norm(self.k_proj(torch.tanh(self.q_proj(self.embed(ids)))))
        grid = self.conv(h.view(len(ids), 1, -1, 64)).mean((1, 2))
        return self.classifier(h.mean(1) + nn.functional.pad(grid, (0, 2)))


IDS = torch.arange(18).view(3, 6)


def net():
    torch.manual_seed(0)
    return Net().eval()


def train(model, seed=1):
    """Give every trainable parameter the size that training would, B and magnitudes included."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 0.3 * parameter.data.abs().mean() if "magnitude" in name else 0.05
            parameter.data += noise * scale
    return model.eval()


def merge(model, directory, base=None):
    """Our merge, from the directory alone."""
    adapter = read_adapter(directory)
    merged = copy.deepcopy(model)
    parameters = dict(merged.named_parameters())
    for name, tensor in adapter.saved.items():
        parameters[name].data = tensor.clone()
    for name, delta in adapter.deltas.items():
        weight = parameters[f"{name}.weight"]
        weight.data = merged_weight(weight.data if base is None else base[name], delta)
        if (bias := delta_bias(delta)) is not None:
            parameters[f"{name}.bias"].data += bias
    return merged


def outputs(model, *inputs):
    with torch.no_grad():
        return model(*inputs)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


LINEAR = {"target_modules": ["q_proj", "k_proj"]}
VARIANTS = {
    "lora": LINEAR,
    "rslora": LINEAR | {"use_rslora": True},
    "dora": LINEAR | {"use_dora": True},
    "dora rslora": LINEAR | {"use_dora": True, "use_rslora": True},
    "patterns": LINEAR
    | {"rank_pattern": {"q_proj": 6}, "alpha_pattern": {"^k_proj": 40, "never": 3}},
    "patterns as expressions": LINEAR | {"rank_pattern": {r"[qk]_proj": 2}},
    "lora_bias": {"target_modules": ["q_proj", "classifier"], "lora_bias": True},
    "bias all": LINEAR | {"bias": "all"},
    "bias lora_only": LINEAR | {"bias": "lora_only", "target_modules": ["q_proj"]},
    "saved head": LINEAR | {"modules_to_save": ["classifier"]},
    "saved norm and head": LINEAR | {"modules_to_save": ["classifier", "norm"]},
    "embedding": {"target_modules": ["embed"]},
    "embedding dora": {"target_modules": ["embed"], "use_dora": True},
    "conv": {"target_modules": ["conv"]},
    "conv dora": {"target_modules": ["conv"], "use_dora": True},
    "everything": {
        "target_modules": ["embed", "q_proj", "k_proj", "conv"],
        "use_dora": True,
        "modules_to_save": ["classifier"],
        "rank_pattern": {"conv": 3},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_merging_from_the_directory_equals_pefts_unmerged_forward(variant, tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=10, lora_dropout=0.1, **VARIANTS[variant])
    model = net()
    adapted = train(peft.get_peft_model(copy.deepcopy(model), config))
    adapted.save_pretrained(tmp_path)
    reference = outputs(adapted, IDS)
    assert relative(outputs(merge(model, tmp_path), IDS), reference) < 1e-6
    assert relative(outputs(model, IDS), reference) > 1e-3  # the adapter does something


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_fan_in_fan_out_equals_peft(dora, tmp_path):
    torch.manual_seed(0)
    model = Conv1D(96, 64).eval()
    config = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules=["c_attn"], fan_in_fan_out=True, use_dora=dora
    )
    adapted = train(peft.get_peft_model(copy.deepcopy(model), config))
    adapted.save_pretrained(tmp_path)
    x = torch.randn(3, 64)
    assert relative(outputs(merge(model, tmp_path), x), outputs(adapted, x)) < 1e-6


def test_merged_weights_equal_pefts_merge(tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=10, use_rslora=True, **LINEAR)
    model = net()
    adapted = train(peft.get_peft_model(copy.deepcopy(model), config))
    adapted.save_pretrained(tmp_path)
    ours = merge(model, tmp_path)
    theirs = adapted.merge_and_unload()
    for name in ("q_proj", "k_proj"):
        a, b = ours.get_submodule(name).weight, theirs.get_submodule(name).weight
        assert relative(a.data, b.data) < 1e-7


WRONG = {
    "scaling alpha/r instead of alpha/sqrt(r)": {"use_rslora": False},
    "alpha doubled": {"lora_alpha": 20},
    "pattern dropped": {"alpha_pattern": {}},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_changed_configuration_fails_the_check(wrong, tmp_path):
    """Negative controls: what the comparison above would see."""
    config = peft.LoraConfig(
        r=4, lora_alpha=10, use_rslora=True, alpha_pattern={"k_proj": 30}, **LINEAR
    )
    model = net()
    adapted = train(peft.get_peft_model(copy.deepcopy(model), config))
    adapted.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | WRONG[wrong]))
    assert relative(outputs(merge(model, tmp_path), IDS), outputs(adapted, IDS)) > 1e-3


# QLoRA: attach to quantized layers, save, load, merge

SPEC = QuantSpec(method="qlora", scheme="nf4", group_size=64, double_quant=True)


def llama(quantized=True):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            vocab_size=48,
        )
    ).eval()
    if quantized:
        quantize_model(model, SPEC)
    return model


TOKENS = torch.arange(1, 13).view(2, 6)


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


SECTIONS = {
    "lora": AdapterSection(rank=4, alpha=10),
    "dora with patterns": AdapterSection(
        rank=4,
        alpha=10,
        use_dora=True,
        rank_pattern={"q_proj": 6},
        alpha_pattern={"layers.1.mlp.up_proj": 33},
    ),
    "rslora with head": AdapterSection(
        rank=4,
        alpha=10,
        use_rslora=True,
        modules_to_save=("lm_head",),
        target_modules=("q_proj", "v_proj"),
    ),
}


@pytest.mark.parametrize("section", SECTIONS)
def test_qlora_round_trip_and_merge_as_trained(section, tmp_path):
    """Train-shaped adapter on NF4: save, load into a fresh model, merge; all the same function."""
    adapted = train(attach_adapter(llama(), SECTIONS[section], task="causal-lm"))
    base = logits(llama())
    reference = logits(adapted)
    assert relative(reference, base) > 1e-2
    save_adapter(adapted, tmp_path)
    again = load_adapter(llama(), tmp_path)
    assert not again.training
    assert torch.equal(logits(again), reference)
    quantized = llama()
    weights = {
        name: dequantize_tensor(packed_of_module(quantized.get_submodule(name)), torch.float32)
        for name in read_adapter(tmp_path).deltas
    }
    plain = llama(quantized=False)
    for name, module in quantized.named_modules():
        if hasattr(module, "quant_state"):
            plain.get_submodule(name).weight.data = dequantize_tensor(packed_of_module(module))
    assert relative(logits(merge(plain, tmp_path, weights)), reference) < 2e-6
    original = merge(llama(quantized=False), tmp_path)  # onto the wrong base: a negative control
    assert relative(logits(original), reference) > 1e-2


def test_gradients_reach_the_adapter_through_quantized_layers():
    adapted = attach_adapter(llama(), AdapterSection(rank=4, alpha=10), task="causal-lm")
    loss = adapted(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    gradients = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * 14
    assert all(g is not None for g in gradients.values())
    assert all(g.abs().sum() > 0 for n, g in gradients.items() if "lora_B" in n)


def test_saving_twice_gives_the_same_bytes_and_no_path(tmp_path):
    model = llama()
    model.config._name_or_path = str(tmp_path)
    adapted = train(attach_adapter(model, SECTIONS["dora with patterns"], task="causal-lm"))
    for name in ("a", "b"):
        save_adapter(adapted, tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    assert str(tmp_path) not in json.dumps(config)
    save_adapter(adapted, tmp_path / "c", base_name="Qwen/Qwen3-0.6B")
    assert read_adapter(tmp_path / "c").config.base_model == "Qwen/Qwen3-0.6B"


def test_the_directory_we_write_loads_in_plain_peft(tmp_path):
    adapted = train(attach_adapter(llama(), SECTIONS["rslora with head"], task="causal-lm"))
    save_adapter(adapted, tmp_path)
    plain = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    assert torch.equal(logits(plain), logits(adapted))


# What PEFT passes over with a warning or in silence


def test_a_pattern_or_target_that_matches_nothing_is_refused():
    for section, words in (
        (AdapterSection(rank_pattern={"q_prj": 4}), "rank_pattern: 'q_prj' matches no"),
        (AdapterSection(alpha_pattern={"lm_head": 4}), "alpha_pattern: 'lm_head' matches no"),
        (AdapterSection(target_modules=("q_proj", "wq")), "target_modules: 'wq' names no part"),
        (AdapterSection(modules_to_save=("score",)), "modules_to_save: 'score' names no part"),
        (AdapterSection(alpha_pattern={"q_proj": 4, "layers.0.*": 5}), "other values"),
    ):
        with pytest.raises(Unsupported, match=words):
            attach_adapter(llama(), section)
    config = peft.LoraConfig(target_modules=["q_proj"], rank_pattern={"q_prj": 4})
    assert peft.get_peft_model(llama(), config)  # PEFT only warns


def test_peft_changes_alpha_on_reload_when_patterns_overlap(tmp_path):
    """Why overlapping patterns are refused: PEFT sorts the keys when it saves."""
    config = peft.LoraConfig(
        r=4, lora_alpha=8, alpha_pattern={"q_proj": 40, "layers.0.*": 16}, target_modules=["q_proj"]
    )
    adapted = train(peft.get_peft_model(llama(), config))
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    assert relative(logits(again), logits(adapted)) > 1e-4, (
        "check no longer needed: PEFT keeps order"
    )
    with pytest.raises(Exception, match="exclusive"):
        read_adapter(tmp_path)


def test_auto_targets_leave_heads_and_saved_modules_out():
    assert auto_targets(llama()) == (
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    )
    assert auto_targets(net(), ("q_proj",)) == ("k_proj",)
    clash = nn.ModuleDict(
        {"a": nn.ModuleDict({"x": nn.Linear(2, 2)}), "b": nn.ModuleDict({"x": nn.Linear(2, 2)})}
    )
    with pytest.raises(Unsupported, match="auto does not work"):
        auto_targets(clash, ("b",))


def test_modules_to_save_does_not_catch_longer_names():
    """PEFT trains `pre_classifier`, too, when asked for `classifier`."""
    model = nn.ModuleDict(
        {
            "q_proj": nn.Linear(4, 4),
            "pre_classifier": nn.Linear(4, 4),
            "classifier": nn.Linear(4, 2),
        }
    )
    section = AdapterSection(target_modules=("q_proj",), modules_to_save=("classifier",))
    with pytest.raises(Unsupported, match="'pre_classifier'"):
        attach_adapter(model, section)


def test_an_adapter_for_another_model_is_refused_where_peft_warns(tmp_path):
    """A mismatched adapter must not silently give the base."""
    adapted = train(attach_adapter(llama(), SECTIONS["lora"], task="causal-lm"))
    save_adapter(adapted, tmp_path)
    smaller = llama()
    smaller.model.layers = smaller.model.layers[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert peft.PeftModel.from_pretrained(copy.deepcopy(smaller), str(tmp_path))  # only warns
    with pytest.raises(Mismatch, match="has no place in"):
        load_adapter(smaller, tmp_path)
    with pytest.raises(Mismatch, match="does not fit this base model"):
        load_adapter(net(), tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"target_modules": [*fields["target_modules"], "lm_head"]}))
    with pytest.raises(Mismatch, match=r"nothing for .*lm_head"):
        load_adapter(llama(), tmp_path)


def test_an_adapter_on_the_embedding_loads_with_the_copy_that_peft_keeps_of_it(tmp_path):
    """PEFT stores the embedding itself beside its factors; the reader counts it as saved."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj"])
    adapted = train(peft.get_peft_model(llama(quantized=False), config))
    adapted.save_pretrained(tmp_path)
    assert set(read_adapter(tmp_path).saved) == {"model.embed_tokens.weight"}
    assert torch.equal(logits(load_adapter(llama(quantized=False), tmp_path)), logits(adapted))
    assert relative(logits(merge(llama(quantized=False), tmp_path)), logits(adapted)) < 1e-6


def test_spec_names_disk_tensors_and_counts_parameters():
    adapted = attach_adapter(llama(), SECTIONS["dora with patterns"], task="causal-lm")
    modules = adapted_modules(adapted)
    assert len(modules) == 14
    spec = adapter_spec(adapted, {f"{m}.weight": f"disk.{m}" for m in modules})
    assert spec.tensors["model.layers.0.mlp.up_proj"] == "disk.model.layers.0.mlp.up_proj"
    assert (spec.rank, spec.alpha, spec.use_dora) == (4, 10, True)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    plain = sum(p.numel() for p in llama(quantized=False).parameters())
    assert parameter_counts(adapted) == (trained, plain + trained)
    with pytest.raises(Mismatch, match="no weight in the base's files"):
        adapter_spec(adapted, {})


def test_peft_4bit_merge_forgets_the_scaling_of_lora_bias():
    """A fault of PEFT that our merge does not share."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    quantize_model(model, SPEC)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], lora_bias=True)
    adapted = peft.get_peft_model(model, config).eval()
    layer = adapted.base_model.model[0]
    layer.lora_B["default"].bias.data.fill_(1.0)
    before = layer.base_layer.bias.data.clone()
    layer.merge()
    added = (layer.base_layer.bias.data - before).mean().item()
    assert added == pytest.approx(1.0), "PEFT now scales lora_bias by 2 in its 4-bit merge"


VERA = AdapterSection(type="vera", rank=12, target_modules=("q_proj", "k_proj"), dropout=0.1)


@pytest.fixture
def vera(tmp_path):
    """A VeRA adapter on layers of different shapes, as trained, and its directory."""
    torch.manual_seed(3)
    adapted = attach_adapter(Net(), VERA).eval()
    for name, parameter in adapted.named_parameters():
        if "vera_lambda" in name:
            assert parameter.requires_grad
            parameter.data += 0.4 * torch.randn_like(parameter)
    save_adapter(adapted, tmp_path / "adapter")
    return adapted, tmp_path / "adapter"


def test_vera_is_read_as_the_low_rank_update_it_is(vera):
    adapted, directory = vera
    stored = read_adapter(directory)
    assert stored.config.kind == "vera" and not stored.without_effect()
    for name in ("q_proj", "k_proj"):
        layer = adapted.get_base_model().get_submodule(name)
        delta = fitted(stored.deltas[name], layer.in_features)
        torch.testing.assert_close(
            merged_weight(layer.base_layer.weight, delta),
            layer.base_layer.weight + layer.get_delta_weight("default"),
            rtol=0,
            atol=1e-6,
        )
        with pytest.raises(Mismatch):
            merged_weight(torch.zeros(len(delta.b), 40), stored.deltas[name])
        with pytest.raises(Mismatch, match="has 97 inputs"):
            fitted(stored.deltas[name], 97)


def test_vera_loads_bit_for_bit_here_and_in_plain_peft(vera):
    adapted, directory = vera
    torch.manual_seed(3)
    plain = Net()
    ids = torch.arange(12).view(3, 4)
    ours = load_adapter(copy.deepcopy(plain), directory)
    assert torch.equal(ours(ids), adapted(ids))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(directory)).eval()
    assert torch.equal(theirs(ids), adapted(ids))
    assert (adapted(ids) - plain(ids)).abs().max() > 1e-3
    spec = adapter_spec(adapted, {f"{n}.weight": n for n in ("q_proj", "k_proj")})
    assert (spec.type, spec.rank, spec.alpha, spec.dropout) == ("vera", 12, None, 0.1)
    assert spec.trained_parameters == 2 * 12 + 96 + 64


def test_damaged_vera_directories_are_refused_by_name(vera):
    _, directory = vera
    file, described = directory / "adapter_model.safetensors", directory / "adapter_config.json"
    tensors, fields = read_tensors(file), json.loads(described.read_text())

    def refused(match, error, changed=None, **config):
        write_tensors(
            file, {k: v for k, v in {**tensors, **(changed or {})}.items() if v is not None}
        )
        described.write_text(json.dumps({**fields, **config}))
        with pytest.raises(error, match=match):
            read_adapter(directory)

    inner, outer = (f"base_model.model.q_proj.vera_lambda_{x}" for x in "db")
    refused("are not stored", Unsupported, save_projection=False)
    refused("'base_model.vera_A' is missing", CorruptCheckpoint, {"base_model.vera_A": None})
    refused("says rank 11", Mismatch, r=11)
    refused("does not have exactly the two vectors", CorruptCheckpoint, {outer: None})
    refused("do not fit", Mismatch, {outer: torch.ones(97)})
    refused("do not fit", Mismatch, {inner: torch.ones(5)})
    refused("NaN", InputRefused, {"base_model.vera_B": tensors["base_model.vera_B"] * torch.nan})
