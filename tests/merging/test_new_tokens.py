"""Tokens that the base has no rows for, merged into embedding and head."""

import json
import sys

import pytest
import torch

from qlx.adapters import TokenRows, attach_adapter, save_adapter, widened
from qlx.checkpoint import resolve_source
from qlx.errors import CheckFailed, Mismatch
from qlx.merging import blocks, merge, plan_of
from qlx.merging.sampled import check_sample
from qlx.models import load_base
from qlx.recipe import AdapterSection
from qlx.training import save_adapter as import_adapter
from qlx.verification import verify
from qlx.weights import open_weights, read_tensors, write_tensors
from tests.adapter_support import VOCABULARY, draw, make_base

MERGE = sys.modules["qlx.merging.merge"]  # the package has a function of that name
NEW = (VOCABULARY, VOCABULARY + 1, VOCABULARY + 2)
BASES = {
    "llama": ("llama", torch.bfloat16, False),
    "tied": ("qwen3", torch.float32, True),
    "gpt2": ("gpt2", torch.float32, False),
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module", params=BASES)
def made(request, tmp_path_factory):
    """A base, and a plain PEFT directory that trains three tokens more than it has."""
    kind, dtype, tied = BASES[request.param]
    root = tmp_path_factory.mktemp("made")
    base = make_base(root / "base", kind, dtype, tied=tied)
    targets = ("c_attn",) if kind == "gpt2" else ("q_proj", "down_proj")
    section = AdapterSection(rank=4, alpha=12, target_modules=targets, new_tokens=("a", "b", "c"))
    model = load_base(base, "causal-lm")
    adapted = attach_adapter(model, section, task="causal-lm", new_ids=NEW)
    draw(adapted, 1.0, 1)
    save_adapter(adapted, root / "adapter")
    return base, root / "adapter"


@pytest.mark.parametrize("how", ["replay", "sampled rows"])
def test_their_rows_come_behind_all_others_which_stay(made, how, tmp_path, monkeypatch):
    base, adapter = made
    monkeypatch.setattr(blocks, "BLOCK", 64)  # a row is a block, so some hold new rows alone
    monkeypatch.setattr(MERGE, "proofs_within", lambda plan, max_ram: [how])
    merged = merge(base, [adapter], tmp_path / "merged")
    assert verify(merged.path).passed
    before, after = read_tensors(base), read_tensors(merged.path)
    config, plain = (json.loads((p / "config.json").read_text()) for p in (merged.path, base))
    assert config["vocab_size"] == VOCABULARY + 3
    assert config["tie_word_embeddings"] == plain["tie_word_embeddings"]
    assert before.keys() == after.keys()
    trained = {
        ("head" if "lm_head" in name else "embedding"): value
        for name, value in read_tensors(adapter / "adapter_model.safetensors").items()
        if "trainable_tokens_delta" in name
    }
    tables = [
        name
        for name in after
        if name.endswith(("embed_tokens.weight", "wte.weight", "lm_head.weight"))
    ]
    assert len(tables) == len(trained)
    for name in tables:
        rows = trained["head" if "lm_head" in name else "embedding"]
        assert torch.equal(after[name][:VOCABULARY], before[name])
        assert torch.equal(after[name][VOCABULARY:], rows.to(before[name].dtype))


def test_sampled_rows_find_a_new_one_that_is_wrong(made, tmp_path):
    base, adapter = made
    merged = merge(base, [adapter], tmp_path / "merged")
    kept = import_adapter(adapter, tmp_path / "kept", base=str(base))
    plan = plan_of(kept, resolve_source(str(base)), None, None, True)
    assert check_sample(plan, open_weights(merged.path)) > 0
    file = merged.path / "model.safetensors"
    tensors = read_tensors(file)
    name = next(n for n in tensors if n.endswith(("embed_tokens.weight", "wte.weight")))
    tensors[name][-1] += 0.5
    write_tensors(file, tensors)
    with pytest.raises(CheckFailed, match=f"row {VOCABULARY + 2} of"):
        check_sample(plan, open_weights(merged.path))


def test_a_row_without_values_is_refused():
    rows = TokenRows("embed", (3, 9, 8), torch.zeros(3, 4))
    assert widened((8, 4), rows) == (10, 4)
    assert widened((12, 4), rows) == (12, 4)
    with pytest.raises(Mismatch, match="replaces row 9 and has none for row 7"):
        widened((7, 4), rows)
