"""Texts packed into rows: none sees another, each counts as it would alone; a chat template of one's own is kept."""

import json

import numpy as np
import pytest
import torch
import transformers

from qlx.checkpoint import open_checkpoint, resolve_source
from qlx.errors import InputRefused, RecipeError
from qlx.inputs import Encoded, TextCodec
from qlx.models import load_model
from qlx.recipe import load_recipe
from qlx.training import check, train
from qlx.training.packing import PackedRows, pack, packed_columns
from qlx.training.progress import read_metrics
from qlx.weights import read_tensors
from tests.conftest import PYTHON_RUN, recipe_of

SHAPE = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
}
MODELS = {
    "llama": transformers.LlamaConfig(**SHAPE),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=4),
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "qwen3": transformers.Qwen3Config(**SHAPE),
    "gemma": transformers.GemmaConfig(**SHAPE),
    "gpt2": transformers.GPT2Config(vocab_size=90, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


def texts(lengths, seed=0):
    """Random texts, of which the first three tokens are a prompt that does not count."""
    random = np.random.default_rng(seed)
    made = [random.integers(1, 90, length).tolist() for length in lengths]
    return [Encoded(ids, [-100] * 3 + ids[3:]) for ids in made]


def rows_of(columns):
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_texts_have_the_loss_of_each_alone(name, attention):
    """In fp32, within float noise, gradients too; with positions that run on, or a mask, they see each other."""
    torch.manual_seed(0)
    config = MODELS[name]
    config._attn_implementation = attention
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    for parameter in model.parameters():
        parameter.data.mul_(3)  # far from the flat beginning
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    items = texts((7, 12, 5, 20, 9))
    packed = pack(items, 32)
    assert len(packed) == 2

    def run(batches):
        model.zero_grad()
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        losses = [
            model(**batch, use_cache=False, num_items_in_batch=count).loss for batch in batches
        ]
        sum(losses).backward()
        return float(sum(losses).detach()), torch.cat(
            [p.grad.flatten() for p in model.parameters()]
        )

    alone, gradient = run(
        [
            {"input_ids": torch.tensor([item.ids]), "labels": torch.tensor([item.labels])}
            for item in items
        ]
    )
    batch = PackedRows(0)(rows_of(packed_columns(packed)))
    together, found = run([batch])
    assert together == pytest.approx(alone, rel=2e-6)
    assert (found - gradient).norm() <= 1e-5 * gradient.norm()
    for wrong in (
        {"position_ids": torch.arange(batch["input_ids"].shape[1])[None].expand(2, -1)},
        {"attention_mask": torch.ones_like(batch["input_ids"])},
    ):
        away = run([{**batch, **wrong}])[0]
        assert abs(away - alone) > 1e-4 * alone, wrong


def test_rows_hold_every_text_once():
    random = np.random.default_rng(1)
    items = texts(random.integers(4, 40, 200))
    rows = pack(items, 64)
    assert all(sum(len(item.ids) for item in row) <= 64 for row in rows)
    assert sorted(item.ids for row in rows for item in row) == sorted(item.ids for item in items)
    assert sum(len(item.ids) for item in items) > 0.95 * 64 * len(rows)  # a row in twenty is fill
    assert pack(items, 64) == rows


@pytest.fixture
def recipe(python_base, tmp_path):
    """Eight short docstrings, all of them in each step."""

    def write(**training):
        most = 512 if training.get("packing") else 128  # of a row, and of a text
        data = {
            "source": "python-docstrings",
            "train_limit": 8,
            "eval_limit": 8,
            "max_length": most,
        }
        steps = {"max_steps": 2, "learning_rate": 4e-3, "log_every": 1, "warmup_ratio": 0}
        return recipe_of(PYTHON_RUN, python_base, data=data, training={**steps, **training})

    return write


def test_packed_training_takes_the_same_steps(recipe, tmp_path):
    """One row of eight texts is a batch of eight."""
    packed = train(recipe(packing=True, batch_size=8), tmp_path / "packed")
    plain = train(recipe(batch_size=8), tmp_path / "plain")
    losses = [
        torch.tensor([row["loss"] for row in read_metrics(run.path / "metrics.jsonl")])
        for run in (packed, plain)
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    one, two = (read_tensors(run.path / "adapter_model.safetensors") for run in (packed, plain))
    for name, value in one.items():
        assert (two[name] - value).norm() <= 1e-3 * value.norm(), name


TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant]{% endif %}"


def test_a_template_of_ones_own_goes_with_the_model(recipe, python_base, tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(TEMPLATE)
    made = recipe(batch_size=4)
    data = {"chat_template": str(path), "answers": "all"}
    made = made.model_copy(update={"data": made.data.model_copy(update=data)})
    check(made)
    run = train(made, tmp_path / "run")
    assert (run.path / "chat_template.jinja").read_text() == TEMPLATE
    assert (python_base / "chat_template.jinja").read_text() != TEMPLATE
    options = open_checkpoint(run.path).manifest.lineage[-1].options
    assert (options["data"]["chat_template"], options["data"]["answers"]) == ("mine.jinja", "all")
    theirs = transformers.AutoTokenizer.from_pretrained(run.path)
    chat = [{"role": "user", "content": "Hi"}]
    shown = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    codec = TextCodec.from_directory(run.path)
    assert shown == codec.chat(chat, answer_next=True) == "[user]Hi<|end|>[assistant]"
    load_model(run, resolve_source(str(python_base)))


@pytest.mark.parametrize(
    ("content", "match"),
    [(None, "data.chat_template: .*cannot be read"), ("{% for %}", "chat template cannot render")],
)
def test_a_template_that_does_not_work_is_refused(recipe, tmp_path, content, match):
    path = tmp_path / "mine.jinja"
    if content is not None:
        path.write_text(content)
    made = recipe()
    made = made.model_copy(
        update={"data": made.data.model_copy(update={"chat_template": str(path)})}
    )
    for act in (check, lambda made: train(made, tmp_path / "run")):
        with pytest.raises(InputRefused, match=match):
            act(made)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("task", "change", "match"),
    [
        ("image-classification", "training.packing=true", "joins texts"),
        ("image-classification", "data.answers=all", "for texts only"),
        ("causal-lm", "data.answers=all", "has no effect"),
    ],
)
def test_fields_that_do_not_apply(tmp_path, task, change, match):
    source = {"image-classification": "digits", "causal-lm": "python-docstrings"}[task]
    content = {"name": "a", "task": task, "base": {"path": "b"}, "data": {"source": source}}
    (tmp_path / "r.yaml").write_text(
        json.dumps({**content, "training": {"completion_only": False}})
    )
    with pytest.raises(RecipeError, match=match):
        load_recipe(tmp_path / "r.yaml", [change])
