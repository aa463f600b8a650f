"""New tokens: room for them, where their rows begin, and what an adapter keeps of them."""

import pytest
import torch

from qlx.adapters import attach_adapter, load_adapter, read_adapter, save_adapter
from qlx.adapters.vocabulary import widen_for
from qlx.errors import Mismatch, Unsupported
from qlx.models import load_base
from qlx.recipe import AdapterSection
from qlx.training.trainable import parameter_table, require_only_adapter
from tests.adapter_support import VOCABULARY, make_base

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NEW = (VOCABULARY, VOCABULARY + 1)
IDS = torch.tensor([[3, VOCABULARY, 5, VOCABULARY + 1, 7]])
SECTION = AdapterSection(rank=2, target_modules=("q_proj", "c_attn"), new_tokens=("<a>", "<b>"))


@pytest.fixture(scope="module", params=["llama", "llama tied", "gpt2", "gemma tied"])
def base(request, tmp_path_factory):
    kind, _, tied = request.param.partition(" ")
    return make_base(tmp_path_factory.mktemp("base") / "base", kind, tied=bool(tied))


def section(base, **options):
    targets = ("c_attn",) if "wte" in str(load_base(base, "causal-lm")) else ("q_proj",)
    return SECTION.model_copy(update={"target_modules": targets, **options})


def attached(base, **options):
    model = load_base(base, "causal-lm")
    return attach_adapter(model, section(base, **options), task="causal-lm", new_ids=NEW)


def tables(model):
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.get_input_embeddings().weight, inner.get_output_embeddings().weight


def test_rows_begin_as_the_mean_and_all_others_stay(base):
    plain = load_base(base, "causal-lm")
    adapted = attached(base)
    require_only_adapter(adapted, section(base))
    groups = {row.group: row.parameters for row in parameter_table(adapted).rows}
    untied = not plain.config.tie_word_embeddings
    assert sum(count for name, count in groups.items() if name.startswith("new tokens")) == (
        2 * 64 * (1 + untied)
    )
    for before, after in zip(tables(plain), tables(adapted), strict=True):
        assert after.shape == (VOCABULARY + 2, 64)
        assert torch.equal(after[:VOCABULARY], before)
        torch.testing.assert_close(after[-2:], before.mean(0).expand(2, -1))
    with torch.no_grad():
        logits = adapted(IDS).logits
        assert logits.shape[-1] == VOCABULARY + 2 and bool(logits.isfinite().all())
        known = IDS.clamp(max=VOCABULARY - 1)
        torch.testing.assert_close(
            adapted(known).logits[..., :VOCABULARY], plain(known).logits, rtol=0, atol=1e-5
        )


def trained(base, **options):
    adapted = attached(base, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return adapted.eval()


def test_what_is_saved_are_the_rows_alone_and_plain_peft_reads_it(base, tmp_path):
    adapted = trained(base)
    save_adapter(adapted, tmp_path)
    stored = read_adapter(tmp_path)
    assert not stored.saved and {rows.indices for rows in stored.rows.values()} == {NEW}
    with torch.no_grad():
        expected = adapted(IDS).logits
        ours = load_adapter(load_base(base, "causal-lm"), tmp_path)
        assert torch.equal(ours(IDS).logits, expected)
        plain = load_base(base, "causal-lm")
        plain.resize_token_embeddings(VOCABULARY + 2)
        theirs = peft.PeftModel.from_pretrained(plain, str(tmp_path)).eval()
        torch.testing.assert_close(theirs(IDS).logits, expected, rtol=0, atol=1e-5)
        with ours.disable_adapter():
            assert (ours(IDS).logits - expected).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_a_sixteen_bit_base_are_trained_and_kept_in_float32(dtype, tmp_path):
    base = make_base(tmp_path / "base", "llama", dtype)
    model = load_base(base, "causal-lm", dtype=dtype)
    adapted = attach_adapter(model, section(base), task="causal-lm", new_ids=NEW)
    rows = [p for name, p in adapted.named_parameters() if "tokens_delta" in name]
    assert {p.dtype for p in rows} == {torch.float32}
    rows[0].data += 1e-4
    save_adapter(adapted, tmp_path / "adapter")
    load_adapter(load_base(base, "causal-lm", dtype=dtype), tmp_path / "adapter")  # bit for bit


def test_a_vocabulary_with_a_gap_belongs_to_another_model(base, tmp_path):
    model = load_base(base, "causal-lm")
    with pytest.raises(Mismatch, match=f"nobody has token {VOCABULARY}"):
        widen_for(model, [VOCABULARY + 1])
    widen_for(model, [3, VOCABULARY - 1])
    assert tables(model)[0].shape[0] == VOCABULARY
    save_adapter(trained(base), tmp_path)
    smaller = load_base(base, "causal-lm")
    smaller.resize_token_embeddings(VOCABULARY - 5)
    with pytest.raises(Mismatch, match=f"nobody has token {VOCABULARY - 5}"):
        load_adapter(smaller, tmp_path)


def test_rows_that_are_trained_with_the_whole_table_too_are_refused(base):
    table = "wte" if "wte" in str(load_base(base, "causal-lm")) else "embed_tokens"
    with pytest.raises(Unsupported, match=f"new_tokens: .*{table}' in modules_to_save or"):
        attached(base, modules_to_save=(table,))


def test_a_head_with_a_bias_is_refused(tmp_path):
    base = make_base(tmp_path / "base", "llama")
    model = load_base(base, "causal-lm")
    model.lm_head = torch.nn.Linear(64, VOCABULARY)
    with pytest.raises(Unsupported, match="has a bias"):
        attach_adapter(model, section(base), task="causal-lm", new_ids=NEW)
