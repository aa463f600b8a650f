"""What is trained: counted as PEFT counts it, and kept in the bytes that a real training keeps."""

from types import SimpleNamespace

import pytest

from qlx.planning import plan_recipe, shape_from_config
from qlx.planning.memory import plan_shape
from qlx.planning.recipes import recipe_setup
from qlx.recipe import Recipe
from tests.planning.test_shapes import EXPERTS, GPT2, OPT, TEXT, _built

ROW = {"source": "python-docstrings", "max_length": 256}
WIDE = {
    "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 256, "vocab_size": 300, "tie_word_embeddings": True,
}  # fmt: skip


def recipe_with(adapter, path="nowhere", dtype="float32", **sections):
    base = {"path": str(path), "dtype": dtype}
    content = {"name": "x", "task": "causal-lm", "base": base, "data": ROW, **sections}
    return Recipe.model_validate(content | ({"adapter": adapter} if adapter else {}))


def planned(kind, fields, adapter, **sections):
    shape = shape_from_config({"model_type": kind, **fields})
    return plan_shape(shape, recipe_setup(recipe_with(adapter, **sections)))


SAVED = [
    ["lm_head", "embed_tokens"], ["lm_head"], ["embed_tokens"], ["model.norm", "q_norm"], ["layers.1.mlp"]
]  # fmt: skip
ADAPTERS = [
    *(("qwen3", {**TEXT, "tie_word_embeddings": tied}, {"modules_to_save": saved, "target_modules": ["q_proj"]})
      for tied in (True, False) for saved in SAVED),
    ("qwen2", TEXT, {"modules_to_save": ["mlp"]}),  # which then gets no adapter
    *(("qwen2", {**TEXT, "tie_word_embeddings": tied}, {"new_tokens": ["a", "b"]}) for tied in (True, False)),
    *((kind, fields, {"bias": bias, "target_modules": targets})
      for kind, fields, targets in (
          ("qwen2", TEXT, ("q_proj", "o_proj")), ("opt", OPT, ("q_proj", "fc2")), ("gpt2", GPT2, ("c_attn",)))
      for bias in ("all", "lora_only")),
    ("opt", OPT, {"bias": "all"}),
    ("qwen2", TEXT, {"type": "vera", "rank": 8, "bias": "lora_only"}),
    ("phi3", TEXT, {"type": "vera", "rank": 8}),
    ("qwen2", TEXT, {"use_dora": True}),
    ("qwen2", TEXT, {"rank_pattern": {"q_proj": 8, r"layers\.0\.mlp\..*": 6, "layers.1.mlp.down_proj": 2}}),
    ("gpt2", GPT2, {"rank_pattern": {"attn.c_proj": 8}}),
    ("phi3", TEXT, {"rank_pattern": {"gate_up_proj": 8}}),
    ("phi3", TEXT, {"target_modules": ["qkv_proj"]}),
    ("qwen3_moe", EXPERTS, {}),
    ("mixtral", TEXT, {"modules_to_save": ["mlp.gate", "experts"]}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "fields", "adapter"), ADAPTERS)
def test_the_count_is_that_of_the_adapter_that_is_attached(kind, fields, adapter):
    from qlx.adapters import attach_adapter, parameter_counts

    adapter = {"rank": 4, **adapter}
    section = recipe_with(adapter).adapter
    ids = range(300 - len(section.new_tokens), 300)
    model = attach_adapter(_built(kind, fields), section, task="causal-lm", new_ids=tuple(ids))
    plan = planned(kind, fields, adapter)
    assert plan.trained_parameters == parameter_counts(model)[0]
    assert plan.notes == ()


@pytest.mark.parametrize(
    ("adapter", "quantization"),
    [
        ({"exact": True}, {"quant_type": "int4", "group_size": 32}),
        ({"exact": True}, {"quant_type": "int4", "group_size": 32, "symmetric": False}),
        ({"exact": True, "learned_scales": False}, {"quant_type": "int8", "group_size": 32}),
        ({"exact": True}, {"quant_type": "nf4", "block_size": 64}),
        ({"exact": "fold"}, {"quant_type": "int2", "group_size": 32}),
    ],
)
def test_an_exact_adapter_learns_scales_and_zero_points(adapter, quantization):
    import transformers

    from qlx.adapters import attach_adapter, parameter_counts
    from qlx.quant import quantize_model
    from qlx.training.job import quant_spec

    adapter = {"rank": 4, **adapter}
    recipe = recipe_with(adapter, quantization=quantization)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDE))
    weights = {n: m.weight.detach().clone() for n, m in model.named_modules() if "_proj" in n}
    quantize_model(model, quant_spec(recipe.quantization, "float32"))
    attached = attach_adapter(model, recipe.adapter, task="causal-lm", original=weights.get)
    plan = planned("llama", WIDE, adapter, quantization=quantization)
    assert plan.trained_parameters == parameter_counts(attached)[0]


def test_saved_embeddings_and_heads_take_sixteen_bytes_a_parameter():
    plain, saved = (
        plan_recipe(recipe_with({"rank": 8, "modules_to_save": modules}, "Qwen/Qwen3-0.6B"))
        for modules in ((), ("lm_head", "embed_tokens"))
    )
    more = saved.trained_parameters - plain.trained_parameters
    assert more == 2 * 151936 * 1024  # copies, although the base ties them
    assert saved.total - plain.total == pytest.approx(16 * more)


@pytest.mark.parametrize(
    ("kind", "fields", "adapter", "says"),
    [
        ("llama", TEXT, {"modules_to_save": ["score"]}, "modules_to_save: 'score' is not counted"),
        ("llama", TEXT, {"rank_pattern": {"conv": 2}}, "rank_pattern: 'conv' is not counted"),
        ("llama", TEXT, {"rank_pattern": {"up": 2}}, "rank_pattern: 'up' is not counted"),
        ("qwen3_moe", {**EXPERTS, "mlp_only_layers": [0]}, {}, "adapters that PEFT gives to experts"),
    ],
)  # fmt: skip
def test_what_is_not_counted_is_said(kind, fields, adapter, says):
    (note,) = planned(kind, fields, {"rank": 4, **adapter}).notes
    assert says in note


# --- Experts


def test_experts_are_neither_quantized_nor_all_of_them_used():
    nf4 = {"quant_type": "nf4", "double_quant": True}
    one = planned("qwen3_moe", EXPERTS, {"rank": 4}, quantization=nf4)
    assert "experts are planned in the base's dtype" in one.notes[0]
    assert one.shape.expert_parameters == 2 * 4 * 3 * 64 * 32
    used = planned("qwen3_moe", {**EXPERTS, "num_experts_per_tok": 4}, {"rank": 4})
    many = planned("qwen3_moe", {**EXPERTS, "num_experts": 400}, {"rank": 4})
    assert many.parts.weights > 10 * one.parts.weights
    assert many.parts.activations == one.parts.activations < used.parts.activations


def test_experts_are_lent_a_layer_at_a_time():
    held = planned("qwen3_moe", EXPERTS, {"rank": 4})
    base, training = {"path": "nowhere", "offload": "cpu"}, {"gradient_checkpointing": True}
    lent = planned("qwen3_moe", EXPERTS, {"rank": 4}, base=base, training=training)
    shape = held.shape
    away = shape.linear_parameters + shape.expert_parameters - shape.expert_parameters // 2
    assert held.parts.weights - lent.parts.weights == 4 * away


@pytest.mark.parametrize(("kind", "used"), [("llama", 0), ("qwen3_moe", 2), ("qwen3_moe", 4)])
def test_activations_are_near_what_autograd_keeps(kind, used):
    fields = {**TEXT, "head_dim": 16, "intermediate_size": 128}
    if used:
        fields |= {"num_experts": 8, "num_experts_per_tok": used, "moe_intermediate_size": 64}
    depths = [{**fields, "num_hidden_layers": depth} for depth in (2, 4)]
    kept = [_kept_by_autograd(kind, sizes) for sizes in depths]
    plans = [planned(kind, sizes, {"rank": 4}, training={"batch_size": 1}) for sizes in depths]
    more = plans[1].activations_without - plans[0].activations_without
    assert more == pytest.approx(kept[1] - kept[0], rel=0.25)


def _kept_by_autograd(kind, fields):
    """Bytes that a forward pass of one row leaves for the backward pass, parameters left out."""
    import torch
    import transformers

    from qlx.adapters import attach_adapter

    config = transformers.CONFIG_MAPPING[kind].from_dict(fields | {"use_cache": False})
    model = transformers.AutoModelForCausalLM.from_config(config)
    model = attach_adapter(model, recipe_with({"rank": 4}).adapter, task="causal-lm").train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.get_base_model().model(input_ids=torch.randint(300, (1, ROW["max_length"])))
    stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for place, size in stores.items() if place not in own)


# --- Bytes


@pytest.fixture(scope="module")
def small_base(tmp_path_factory):
    import transformers

    directory = tmp_path_factory.mktemp("base")
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**WIDE)).save_pretrained(directory)
    return directory


def _after_a_step(recipe, base, tmp_path):
    """The trained parameters after one step, the dtypes of their gradients, and the optimizer's state."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    from qlx.adapters import attach_adapter
    from qlx.inputs import Encoded
    from qlx.models import load_base, torch_float
    from qlx.training.trainers import text_trainer

    model = load_base(base, "causal-lm", dtype=torch_float(recipe.base.dtype))
    if recipe.adapter is not None:
        model = attach_adapter(model, recipe.adapter, task="causal-lm")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"p": 0, "e": 1}, unk_token="p")),
        pad_token="p", eos_token="e",
    )  # fmt: skip
    items = [Encoded(list(range(2, 20)), list(range(2, 20))) for _ in range(2)]
    trainer = text_trainer(model, items, tokenizer, recipe.training, tmp_path, 32)
    trainer._save_checkpoint = lambda *_, **__: None
    trainer.held_out = SimpleNamespace(enough=False, due=lambda *_: False)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    gradients = {}
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(
            lambda p: gradients.update({id(p): p.grad.nbytes})
        )
    trainer.train()
    states = [trainer.optimizer.state[p] for p in trained]
    moments = [v for s in states for v in s.values() if isinstance(v, torch.Tensor) and v.dim()]
    return trained, gradients, moments


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "adapter", [None, {"rank": 4, "modules_to_save": ["lm_head", "embed_tokens"], "bias": "all"}]
)
def test_trained_weights_take_what_they_take_in_a_training(adapter, dtype, small_base, tmp_path):
    training = {"max_steps": 1, "batch_size": 2}
    recipe = recipe_with(adapter, small_base, dtype=dtype, training=training)
    trained, gradients, moments = _after_a_step(recipe, small_base, tmp_path)
    plan = plan_recipe(recipe)
    assert plan.trained_parameters == sum(p.numel() for p in trained)
    assert plan.parts.gradients == sum(gradients.values())
    assert plan.parts.optimizer == sum(value.nbytes for value in moments)
    biases = 2 * (128 + 64 + 64) if adapter else 0  # which are among the weights
    kept = plan.parts.adapter if adapter else plan.parts.weights
    width = {"float32": 4, "bfloat16": 2}[dtype]
    assert kept == sum(p.nbytes for p in trained) - biases * width


def test_an_embedding_has_moments_in_fp32_whatever_the_others_are_in(small_base, tmp_path):
    training = {"max_steps": 1, "batch_size": 2, "optimizer": "adamw_8bit"}
    recipe = recipe_with(None, small_base, dtype="bfloat16", training=training)
    plan = plan_recipe(recipe)
    assert plan.parts.optimizer == 2 * plan.trained_parameters + 6 * 300 * 128
    _, _, moments = _after_a_step(recipe, small_base, tmp_path)
    table = [value for value in moments if value.numel() == 300 * 128]
    assert sum(value.nbytes for value in table) == 8 * 300 * 128
    maps = [value for value in moments if value.numel() == 256 * 128]
    assert {value.element_size() for value in maps} == {1}
