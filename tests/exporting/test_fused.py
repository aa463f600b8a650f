"""Fused attention against torch, where the architectures differ, and the graph's own form."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from qlx.cli import main
from qlx.errors import UsageError
from qlx.exporting import build_graph, export_onnx, write_graph
from qlx.exporting.fused import FUSED, can_fuse
from qlx.runtime import CausalDecoder, OnnxPredictor, SamplingOptions, TextGenerator, open_model
from qlx.verification import verify
from tests.exporting.matrix import _TEXT
from tests.onnx_support import merged_checkpoint, spread

LENGTH = 40
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 24,
}
CAPPED = {"attn_logit_softcapping": 2.0, "sliding_window": 8, "query_pre_attn_scalar": 16}
CASES = {
    "llama with llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "qwen3 with yarn": ("qwen3", {"rope_parameters": YARN}),
    "phi3 turned in part": (
        "phi3",
        {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 96},
    ),
    "gemma2 with a low cap": ("gemma2", CAPPED),
    "mistral with a window": ("mistral", {"sliding_window": 8}),
    "bitnet": ("bitnet", {}),
}
"""Model type and fields of what the matrix does not have, or has too mildly to show."""

DEFAULT = ("gemma2 with a low cap",)


def model_of(model_type, **fields):
    import transformers

    torch.manual_seed(2)
    config = transformers.CONFIG_MAPPING[model_type](**(_TEXT | fields))
    return spread(transformers.AutoModelForCausalLM.from_config(config)).eval()


def batch():
    """Rows padded on the left, on the right and not at all."""
    ids = np.random.default_rng(3).integers(6, 300, (3, LENGTH))
    mask = np.ones_like(ids)
    mask[0, :13], mask[1, 29:] = 0, 0
    return ids, mask


def of_torch(model, ids, mask):
    places = np.maximum(mask.cumsum(1) - 1, 0)
    with torch.inference_mode():
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
        return model(**{name: torch.tensor(each) for name, each in given.items()}).logits.numpy()


def distance(found, expected, mask):
    real = mask.astype(bool)
    return np.linalg.norm((found - expected)[real]) / np.linalg.norm(expected[real])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A merged Llama and its export."""
    room = tmp_path_factory.mktemp("fused")
    merged = merged_checkpoint(room / "merged", "causal-lm")
    return merged, export_onnx(merged, room / "onnx")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in DEFAULT else [pytest.mark.exhaustive])
        for name in CASES
    ],
)
def test_it_is_what_torch_computes(name, tmp_path):
    model_type, fields = CASES[name]
    model, (ids, mask) = model_of(model_type, **fields), batch()
    assert can_fuse(model, "causal-lm")
    done = export_onnx(merged_checkpoint(tmp_path / "m", "causal-lm", model), tmp_path / "onnx")
    expected, opened = of_torch(model, ids, mask), open_model(done.path, 1)
    found = OnnxPredictor(opened).predict({"input_ids": ids, "attention_mask": mask})
    assert distance(found, expected, mask) < 1e-5
    decoder = CausalDecoder(opened, 3)
    steps = [decoder.feed(ids[:, at : at + 1], mask[:, at : at + 1]) for at in range(LENGTH)]
    assert distance(np.concatenate(steps, 1), expected, mask) < 1e-5
    wrong = model_of(model_type, **_without(fields))
    assert distance(found, of_torch(wrong, ids, mask), mask) > 1e-3


def _without(fields):
    """The same model without what the case is about."""
    off = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    gone = {"sliding_window": 32, "attn_logit_softcapping": 50.0, "partial_rotary_factor": 1.0}
    return {**fields, **{n: v for n, v in {**off, **gone}.items() if n in fields}} or {
        "rms_norm_eps": 0.5
    }


def test_an_export_has_one_fused_node_a_layer_and_says_so(llama, capsys):
    graph = onnx.load(llama[1].path / "model.onnx", load_external_data=False).graph
    found = Counter(node.op_type for node in graph.node)
    assert found["GroupQueryAttention"] == 2
    assert found["RotaryEmbedding"] == 4
    assert found["SkipSimplifiedLayerNormalization"] == 4
    assert found["RMSNormalization"] == 1
    assert not {"Softmax", "Transpose", "Slice", "Range", "Reshape"} & set(found)
    used = {name for node in graph.node for name in node.input} | {out.name for out in graph.output}
    assert all(used.intersection(node.output) for node in graph.node)
    assert llama[1].manifest.lineage[-1].options["attention"] == "fused"
    assert open_model(llama[1].path).fused
    for path, lines in ((llama[1].path, 1), (llama[0].path, 0)):
        assert main(["inspect", str(path)]) == 0
        assert capsys.readouterr().out.count("attention     fused") == lines


def test_what_the_kernel_does_not_take_is_exported_generic(tmp_path):
    odd = model_of("llama", head_dim=12)
    assert not can_fuse(odd, "causal-lm")
    assert not can_fuse(odd, "image-classification")
    assert "gpt2" not in FUSED
    done = export_onnx(merged_checkpoint(tmp_path / "m", "causal-lm", odd), tmp_path / "onnx")
    assert done.manifest.lineage[-1].options["attention"] == "generic"
    assert not open_model(done.path).fused
    assert verify(done.path).passed


def test_a_buffer_that_grows_changes_no_token(llama, monkeypatch):
    generator = TextGenerator(llama[1].path, threads=1)
    expected = generator.generate("def add(", SamplingOptions(max_tokens=60)).tokens
    monkeypatch.setattr("qlx.runtime.cache._ROOM", 1)
    assert generator.generate("def add(", SamplingOptions(max_tokens=60)).tokens == expected
    assert len(set(expected)) > 1


def test_two_decoders_of_one_model_do_not_share_a_cache(llama):
    model, ids = open_model(llama[1].path, 1), np.arange(6, 26)[None]
    alone = CausalDecoder(model).feed(ids)
    one, other = CausalDecoder(model), CausalDecoder(model)
    for at in range(0, 20, 5):
        last = one.feed(ids[:, at : at + 5])
        other.feed(ids[:, ::-1][:, at : at + 5])
    np.testing.assert_allclose(last, alone[:, 15:], atol=1e-5)
    assert not np.allclose(other.feed(ids[:, :1]), alone[:, :1], atol=1e-2)


def test_rows_of_one_batch_step_as_alone_whatever_their_padding(llama):
    """Steps without a mask, after a prompt that has one: each row goes on from its own last place."""
    model, (ids, mask) = open_model(llama[1].path, 1), batch()
    rows = CausalDecoder(model, 3)
    rows.feed(ids, mask)
    more = np.arange(7, 22).reshape(3, 5)
    found = np.stack([rows.feed(more[:, at : at + 1])[:, 0] for at in range(5)], axis=1)
    for row in range(3):
        whole = np.concatenate([ids[row][mask[row] > 0], more[row]])[None]
        expected = CausalDecoder(model).feed(whole)[:, -5:]
        np.testing.assert_allclose(found[row], expected[0], atol=1e-5 * np.abs(expected).max())
    with pytest.raises(UsageError, match=r"tokens of shape \(1, 1\) for a batch of 3"):
        rows.feed(more[:1, :1])


@pytest.mark.exhaustive
def test_the_generic_graph_of_the_same_model_generates_the_same(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("qlx.exporting.export.can_fuse", lambda model, task: False)
    generic = export_onnx(llama[0], tmp_path / "generic")
    monkeypatch.undo()
    options = SamplingOptions(max_tokens=60)
    texts = [
        TextGenerator(each.path, threads=1).generate("def add(", options).tokens
        for each in (generic, llama[1])
    ]
    assert texts[0] == texts[1]
    assert not open_model(generic.path).fused
    assert open_model(llama[1].path).fused


@pytest.mark.exhaustive
def test_a_kernel_given_another_window_is_seen(tmp_path):
    model, (ids, mask) = model_of("mistral", sliding_window=8), batch()
    graph = build_graph(model, "causal-lm", fuse=True)
    found = {}
    for window in (8, 9):
        for node in graph.graph:
            if node.op_type == "GroupQueryAttention":
                assert node.attributes["local_window_size"].as_int() in (8, 9)
                node.attributes.add(ir.AttrInt64("local_window_size", window))
        room = tmp_path / str(window)
        room.mkdir()
        write_graph(graph, room, "causal-lm")
        found[window] = distance(_plain(room, ids, mask), of_torch(model, ids, mask), mask)
    assert found[8] < 1e-5
    assert found[9] > 1e-3


def _plain(room, ids, mask):
    import onnxruntime as ort

    session = ort.InferenceSession(str(room / "model.onnx"))
    empty = {
        each.name: np.zeros((len(ids), each.shape[1], 0, each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past")
    }
    places = np.maximum(mask.cumsum(1) - 1, 0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": places, **empty}
    return session.run(["logits"], inputs)[0]
