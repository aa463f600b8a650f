"""A LoRA as a GGUF file: what llama.cpp makes of it is what a merge adds to the base."""

import json

import pytest
import torch

from qlx.errors import Unsupported
from qlx.merging import merge
from qlx.models import gguf_layout, model_config
from qlx.training import save_adapter, train
from qlx.weights import read_tensors
from tests.adapter_support import NONE, Case, make_adapter, make_base
from tests.conftest import PYTHON_RUN, recipe_of

gguf = pytest.importorskip("gguf")

KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text")


def added(path):
    """The change of each weight, as llama.cpp computes it: alpha / r times B A; and the file's alpha."""
    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    parts = {}
    for tensor in reader.tensors:
        name, _, part = tensor.name.rpartition(".")
        parts.setdefault(name, {})[part] = torch.from_numpy(tensor.data.copy()).double()
    return {
        name: (alpha / len(two["lora_a"])) * two["lora_b"] @ two["lora_a"]
        for name, two in parts.items()
    }, alpha


def wanted(base, merged):
    """What a merge adds, with rows as llama.cpp has them, by its names."""
    layout = gguf_layout(model_config(base, "causal-lm"))
    before, after = read_tensors(base), read_tensors(merged)
    changed = [name for name in after if not torch.equal(before[name], after[name])]
    return {
        layout.name(n): (layout.stored(n, after[n]) - layout.stored(n, before[n])).double()
        for n in changed
    }


def same(found, expected):
    assert found.keys() == expected.keys()
    return all(
        torch.allclose(found[name], value, rtol=1e-4, atol=1e-6) for name, value in expected.items()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_it_adds_what_a_merge_adds(kind, tmp_path):
    base = make_base(tmp_path / "base", kind, tied=kind not in ("llama", "mistral", "qwen2"))
    adapter = make_adapter(base, tmp_path / "adapter", Case(kind, NONE))
    done = save_adapter(adapter.path, tmp_path / "with", gguf=True)
    assert "adapter.gguf" in done.manifest.files
    merged = merge(base, [adapter.path], tmp_path / "merged", dtype="float32")
    found, _ = added(done.path / "adapter.gguf")
    assert same(found, wanted(base, merged.path))
    again = save_adapter(adapter.path, tmp_path / "again", gguf=True)
    assert again.manifest.files["adapter.gguf"] == done.manifest.files["adapter.gguf"]
    if kind == "llama":  # negative control: rows in transformers' order
        plain = {name: value.flip(0) for name, value in found.items()}
        assert not same(plain, wanted(base, merged.path))


@pytest.fixture
def plain_run(python_base, tmp_path):
    def run(**adapter):
        training = {"max_steps": 6, "batch_size": 16, "learning_rate": 4e-3}
        sections = {"quantization": None, "adapter": adapter, "training": training}
        return train(recipe_of(PYTHON_RUN, python_base, **sections), tmp_path / "run")

    return run


PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 24}}


@pytest.mark.parametrize(
    "adapter",
    [
        {"rank": 4, "alpha": 6, "use_rslora": True},
        {"rank": 4, "alpha": 6, **PATTERNS},
        pytest.param(
            {"rank": 4, "alpha": 6, "use_rslora": True, **PATTERNS}, marks=pytest.mark.exhaustive
        ),
        {"type": "vera", "rank": 16},
    ],
    ids=["rslora", "patterns", "both", "vera"],
)
def test_every_scaling_arrives(adapter, plain_run, python_base, tmp_path):
    """llama.cpp knows one alpha for the file; the plain one would be wrong for each of these."""
    run = plain_run(**adapter)
    done = save_adapter(run.path, tmp_path / "adapter", gguf=True)
    merged = merge(python_base, [run.path], tmp_path / "merged", dtype="float32")
    found, alpha = added(done.path / "adapter.gguf")
    expected = wanted(python_base, merged.path)
    assert same(found, expected)
    if adapter.get("use_rslora"):
        raw = json.loads((done.path / "adapter_config.json").read_text())["lora_alpha"]
        assert alpha == pytest.approx(2 * raw)
        assert not same({name: value * raw / alpha for name, value in found.items()}, expected)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"rank": 4, "alpha": 6, "use_dora": True}, "is DoRA's"),
        ({"rank": 4, "alpha": 6, "modules_to_save": ["lm_head"]}, "trains 'lm_head.weight' whole"),
        ({"rank": 4, "alpha": 6, "new_tokens": ["<|tool|>"]}, "whole"),
    ],
)
def test_what_it_cannot_say_is_refused(adapter, words, plain_run, tmp_path):
    run = plain_run(**adapter)
    with pytest.raises(Unsupported, match=words):
        save_adapter(run.path, tmp_path / "adapter", gguf=True)
    assert not (tmp_path / "adapter").exists()


def test_it_is_for_language_models(digits_run, tmp_path):
    with pytest.raises(Unsupported, match="language models"):
        save_adapter(digits_run, tmp_path / "adapter", gguf=True)
