"""Every kind of adapter from its recipe to the merged model, on plain and on quantized bases."""

import json
import shutil

import numpy as np
import pytest
import torch

from qlx.adapters import initial
from qlx.checkpoint import read_probe, resolve_source
from qlx.cli.trial import try_adapter
from qlx.errors import CorruptCheckpoint, InputRefused, Unsupported
from qlx.exporting import export_onnx
from qlx.merging import merge
from qlx.models import forward_logits, load_model
from qlx.packing import pack
from qlx.training import check, save_adapter, train
from qlx.training.material import load_material
from qlx.training.trainers import StrictTrainer
from qlx.verification import evaluate, verify
from qlx.weights import read_tensors
from tests.conftest import DIGITS_RUN, PYTHON_RUN, recipe_of

SHORT = {"max_steps": 8, "batch_size": 16, "learning_rate": 4e-3}
SCHEMES = {
    "none": None,
    "nf4": {"quant_type": "nf4"},
    "int8": {"quant_type": "int8"},
    "int4": {"quant_type": "int4", "group_size": 32},
    "ternary": {"quant_type": "ternary", "group_size": 32},
}
KINDS = {
    "pissa": {"rank": 4, "alpha": 6, "init_lora_weights": "pissa", "rank_pattern": {"fc1": 3}},
    "fast pissa": {"rank": 4, "alpha": 6, "init_lora_weights": "pissa_niter_4", "use_rslora": True},
    "loftq": {"rank": 4, "alpha": 6, "init_lora_weights": "loftq"},
    "vera": {"type": "vera", "rank": 32, "d_initial": 0.5},
}
TAGS = {"pissa": "_PiSSA4_", "fast pissa": "_PiSSA4_", "loftq": "_LoftQ4_", "vera": "_VeRa32_"}
QUICK = {("pissa", "ternary"), ("loftq", "int4"), ("vera", "nf4")}


def cells():
    return list(_cells())


def _cells():
    for kind in KINDS:
        for scheme in SCHEMES:
            if (kind, scheme) != ("loftq", "none"):
                quick = (kind, scheme) in QUICK
                yield pytest.param(kind, scheme, marks=() if quick else pytest.mark.exhaustive)


@pytest.mark.parametrize(("kind", "scheme"), cells())
def test_it_goes_all_the_way(kind, scheme, digits_base, tmp_path):
    base = str(digits_base)
    recipe = recipe_of(
        DIGITS_RUN, base, adapter=KINDS[kind], quantization=SCHEMES[scheme], training=SHORT
    )
    found = check(recipe)
    run = train(recipe, tmp_path / "run")
    spec = run.manifest.adapter
    assert TAGS[kind] in run.manifest.tag and found.tag == run.manifest.tag
    assert len(found.adapted) == 12
    counts = [(x.trained_parameters, x.total_parameters) for x in (found, spec)]
    assert counts[0] == counts[1]
    adapter = save_adapter(run.path, tmp_path / "adapter", base=base)
    assert verify(adapter.path, base=base).passed
    assert try_adapter(adapter.path, base).passed
    merged = merge(base, [adapter.path], tmp_path / "merged", dtype="float32")
    assert merged.manifest.lineage[-1].options["exact"]
    assert verify(merged.path).passed
    scores = [evaluate(path, base=b) for path, b in ((adapter.path, base), (merged.path, None))]
    assert scores[0].metrics["loss"] == pytest.approx(scores[1].metrics["loss"], rel=1e-4)
    packed = pack(merged.path, tmp_path / "packed", to="int8", base=base, min_retention=0.0)
    assert verify(packed.path).passed
    if scheme == "nf4":
        for name, source, b in (("separate", adapter, base), ("onnx", merged, None)):
            assert verify(export_onnx(source.path, tmp_path / name, base=b).path).passed


def test_the_manifest_says_how_it_began_and_both_ranks(digits_base, tmp_path):
    adapter = {**KINDS["pissa"], "alpha_pattern": {"fc2": 3}}
    recipe = recipe_of(DIGITS_RUN, digits_base, adapter=adapter, quantization=None, training=SHORT)
    run = train(recipe, tmp_path / "run")
    spec = run.manifest.adapter
    assert (spec.initialized, spec.trained_rank, spec.rank, spec.alpha) == ("pissa", 4, 8, 12)
    assert (spec.rank_pattern, spec.alpha_pattern) == ({"fc1": 6}, {"fc2": 6})
    plain = json.loads((run.path / "adapter_config.json").read_text())
    assert (plain["r"], plain["init_lora_weights"], plain["peft_type"]) == (8, True, "LORA")
    assert run.manifest.files.keys() >= {"adapter_model.safetensors"}
    before = run.manifest.lineage[-1].options["before"]
    assert before["loss"] == pytest.approx(_plain_loss(recipe), rel=1e-5)


def _plain_loss(recipe):
    """The held-out loss of the base alone, on the recipe's data."""
    return evaluate(recipe.base.path, data=recipe.data).metrics["loss"]


def test_loftq_begins_nearer_to_the_plain_base_and_belongs_to_the_quantized_one(
    digits_base, tmp_path
):
    options = {"quantization": SCHEMES["ternary"], "training": {**SHORT, "max_steps": 1}}
    adapter = {**KINDS["loftq"], "rank": 16}
    started = {}
    for name, section in (("loftq", adapter), ("lora", {"rank": 16, "alpha": 6})):
        recipe = recipe_of(DIGITS_RUN, digits_base, adapter=section, **options)
        recipe = recipe.model_copy(
            update={"data": recipe.data.model_copy(update={"variant": "plain"})}
        )
        run = train(recipe, tmp_path / name)
        started[name] = run.manifest.lineage[-1].options["before"]["loss"]
    assert started["loftq"] < started["lora"]
    kept = save_adapter(tmp_path / "loftq", tmp_path / "adapter")
    assert kept.manifest.adapter.initialized == "loftq"
    with pytest.raises(Unsupported, match=r"loftq.*leave --onto original out"):
        merge(digits_base, [kept.path], tmp_path / "merged", onto="original")
    assert not (tmp_path / "merged").exists()


@pytest.mark.exhaustive
def test_a_resumed_pissa_ends_in_the_bytes_of_an_unbroken_one(digits_base, tmp_path, monkeypatch):
    """Also where the decomposition comes out otherwise: singular vectors have no sign of their own."""
    training = {**SHORT, "save_every": 3}
    recipe = recipe_of(
        DIGITS_RUN,
        digits_base,
        adapter=KINDS["pissa"],
        quantization=SCHEMES["int4"],
        training=training,
    )
    train(recipe, tmp_path / "unbroken")
    step, exact = StrictTrainer.training_step, initial.low_rank

    def dying(self, *args, **kwargs):
        if self.state.global_step == 5:
            raise RuntimeError("the machine is gone")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(StrictTrainer, "training_step", dying)
        with pytest.raises(RuntimeError):
            train(recipe, tmp_path / "resumed")
    monkeypatch.setattr(initial, "low_rank", lambda *given: tuple(-part for part in exact(*given)))
    train(recipe, tmp_path / "resumed", resume=True)
    train(recipe, tmp_path / "elsewhere")
    files = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes()
        for name in ("unbroken", "resumed", "elsewhere")
    ]
    assert files[0] == files[1] != files[2]


TOKENS = ("<|tool|>", "<|end_of_tool|>")


@pytest.fixture
def calls(tmp_path):
    """Texts whose answers begin with one new token and end with the other."""
    rows = [
        {"prompt": f"call {n}: ", "completion": f"{TOKENS[0]} add {n}{TOKENS[1]}"}
        for n in range(80)
    ]
    path = tmp_path / "calls.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def tied(base, target):
    """The same base with its embedding as its head, as transformers saves it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (target / name).write_bytes((base / name).read_bytes())
    return target


@pytest.mark.parametrize(
    ("scheme", "one_table", "dtype"),
    [
        ("none", True, "float32"),
        pytest.param("int4", False, "bfloat16", marks=pytest.mark.exhaustive),
        pytest.param("nf4", True, "bfloat16", marks=pytest.mark.exhaustive),
        pytest.param("ternary", False, "float32", marks=pytest.mark.exhaustive),
        pytest.param("int8", True, "float32", marks=pytest.mark.exhaustive),
    ],
)
def test_new_tokens_are_learned_and_merged(scheme, one_table, dtype, python_base, calls, tmp_path):
    base = tied(python_base, tmp_path / "base") if one_table else python_base
    recipe = recipe_of(
        PYTHON_RUN,
        base,
        data={"source": "text", "path": str(calls), "max_length": 48},
        adapter={"rank": 4, "alpha": 6, "new_tokens": TOKENS},
        quantization=SCHEMES[scheme],
        training={**SHORT, "max_steps": 40, "learning_rate": 2e-2},
    )
    recipe = recipe.model_copy(update={"base": recipe.base.model_copy(update={"dtype": dtype})})
    assert check(recipe).trained_parameters is not None
    run = train(recipe, tmp_path / "run")
    spec = run.manifest.adapter
    assert spec.new_tokens == TOKENS
    assert spec.trained_parameters == check(recipe).trained_parameters
    adapter = save_adapter(run.path, tmp_path / "adapter", base=str(base))
    assert verify(adapter.path, base=str(base)).passed
    assert try_adapter(adapter.path, str(base)).passed
    merged = merge(base, [adapter.path], tmp_path / "merged")
    assert verify(merged.path).passed
    scores = [
        evaluate(path, base=b, data=recipe.data).metrics
        for path, b in ((adapter.path, str(base)), (merged.path, None))
    ]
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=2e-3)
    before = run.manifest.lineage[-1].options["before"]["loss"]
    assert scores[0]["loss"] < 0.65 * before
    _answers_in_transformers(merged.path, adapter.path, one_table)
    if scheme == "nf4":
        separate = export_onnx(adapter.path, tmp_path / "separate", base=str(base))
        graph = export_onnx(merged.path, tmp_path / "onnx")
        file = pack(merged.path, tmp_path / "gguf", to="gguf", gguf_type="F16", base=base)
        assert all(verify(made.path).passed for made in (separate, graph, file))


def _answers_in_transformers(merged, adapter, one_table):
    """Plain transformers knows the tokens, has their trained rows, and answers with them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    ids = tokenizer("".join(TOKENS), add_special_tokens=False).input_ids
    assert len(ids) == 2 and max(ids) == model.config.vocab_size - 1 == len(tokenizer) - 1
    assert model.config.tie_word_embeddings == one_table
    stored = read_tensors(adapter / "adapter_model.safetensors")
    rows = {name: value for name, value in stored.items() if "trainable_tokens_delta" in name}
    assert len(rows) == (1 if one_table else 2)
    for name, value in rows.items():
        table = model.get_output_embeddings() if "lm_head" in name else model.get_input_embeddings()
        torch.testing.assert_close(table.weight[ids], value, rtol=0, atol=0)
    prompt = tokenizer("call 5: ", return_tensors="pt", add_special_tokens=False).input_ids
    with torch.no_grad():
        assert int(model(prompt).logits[0, -1].argmax()) == ids[0]


def test_a_token_that_is_there_already_is_refused(python_base, calls, tmp_path):
    recipe = recipe_of(
        PYTHON_RUN,
        python_base,
        data={"source": "text", "path": str(calls)},
        adapter={"new_tokens": ("<|user|>",)},
        training=SHORT,
    )
    for attempt in (check, lambda r: train(r, tmp_path / "run")):
        with pytest.raises(InputRefused, match=r"new_tokens: '<\|user\|>' is in the base's voc"):
            attempt(recipe)


def test_a_base_without_its_tokenizer_is_named(python_base, calls, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(python_base, base)
    data, adapter = {"source": "text", "path": str(calls)}, {"new_tokens": ("<|call|>",)}
    recipe = recipe_of(PYTHON_RUN, base, data=data, adapter=adapter, training=SHORT)
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(CorruptCheckpoint, match=r"tokenizer\.json: not a tokenizer"):
        load_material(recipe, base, tmp_path)
    (base / "tokenizer.json").unlink()
    with pytest.raises(InputRefused, match=r"base.tokenizer\.json: missing"):
        load_material(recipe, base, tmp_path)


def test_an_adapter_with_swapped_rows_would_be_noticed(python_base, calls, tmp_path):
    """Negative control: the probe tells two new tokens apart."""
    recipe = recipe_of(
        PYTHON_RUN,
        python_base,
        data={"source": "text", "path": str(calls), "max_length": 48},
        adapter={"rank": 4, "alpha": 6, "new_tokens": TOKENS},
        quantization=None,
        training={**SHORT, "max_steps": 20, "learning_rate": 2e-2},
    )
    run = train(recipe, tmp_path / "run")
    model, probe = load_model(run, resolve_source(str(python_base))), read_probe(run.path)
    outputs = forward_logits(model, "causal-lm", probe.inputs)
    scale = np.abs(probe.reference).max()
    assert np.abs(outputs - probe.reference).max() < 1e-5 * scale
    for name, value in model.named_parameters():
        if "trainable_tokens_delta" in name:
            value.data = value.data.flip(0)
    swapped = forward_logits(model, "causal-lm", probe.inputs)
    assert np.abs(swapped - probe.reference).max() > 1e-2 * scale
