"""Exports with the head in 8 bits: what it holds, what that costs, and where it is refused."""

import numpy as np
import onnx
import pytest
import torch

from qlx.cli import main
from qlx.errors import CheckFailed, Unsupported, UsageError
from qlx.exporting import export_adapters, export_onnx
from qlx.exporting.head import pack_head
from qlx.packing import pack
from qlx.runtime import SamplingOptions, TextGenerator
from qlx.verification import verify
from qlx.verification.graph import graph_weights
from tests.exporting.test_fused import model_of
from tests.onnx_support import merged_checkpoint


def results_of(checkpoint):
    return {result.against: result.metrics for result in checkpoint.manifest.probe.results}


def head_of(checkpoint):
    """The head's node, and its matrix [vocabulary, width] as the graph acts."""
    path = checkpoint.path / "model.onnx"
    nodes = onnx.load(path, load_external_data=False).graph.node
    (node,) = [each for each in nodes if "logits" in each.output]
    return node, graph_weights(path)["lm_head.weight"]()


def test_the_head_is_stored_in_8_bits_and_says_what_that_moved(merged, tmp_path, capsys):
    lines = []
    done = export_onnx(merged["causal-lm"], tmp_path / "packed", head="int8", report=lines.append)
    plain = export_onnx(merged["causal-lm"], tmp_path / "plain")
    (node, found), (product, wanted) = head_of(done), head_of(plain)
    assert (node.op_type, product.op_type) == ("MatMulNBits", "MatMul")
    moved = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    options = done.manifest.lineage[-1].options
    assert options["head"] == "int8"
    assert options["head_rounded"] == pytest.approx(moved, rel=1e-4)
    assert 1e-3 < moved < 1e-2
    steps = np.abs(wanted).reshape(len(wanted), -1, 64).max(axis=2) / 127
    assert (np.abs(found - wanted).reshape(*steps.shape, 64).max(axis=2) <= 0.501 * steps).all()
    assert any(f"its weights moved by {100 * moved:.2f} %" in line for line in lines)
    assert done.manifest.tag == f"{plain.manifest.tag}_headint8"
    assert "head" not in plain.manifest.lineage[-1].options
    assert 1e-4 < results_of(done)["the exported checkpoint"]["relative"] < 1e-2
    assert results_of(plain)["reference"]["relative"] < 1e-5
    assert verify(done.path).passed
    for each, count in ((done, 1), (plain, 0)):
        assert main(["inspect", str(each.path)]) == 0
        assert capsys.readouterr().out.count("head          int8, weights moved by") == count


def test_the_layers_of_a_pack_keep_their_codes_beside_it(merged, tmp_path):
    packed = pack(merged["causal-lm"].path, tmp_path / "packed", to="int4", min_retention=0)
    plain, done = (
        export_onnx(packed, tmp_path / name, accuracy_level=4, head=head)
        for name, head in (("plain", None), ("head", "int8"))
    )
    one, other = (graph_weights(each.path / "model.onnx") for each in (plain, done))
    differ = {name for name in one if not np.array_equal(one[name](), other[name]())}
    assert one.keys() == other.keys()
    assert differ == {"lm_head.weight"}
    assert verify(done.path).passed
    options = SamplingOptions(max_tokens=8)
    assert TextGenerator(done.path, threads=1).generate("def add(", options).tokens


def test_a_tied_embedding_keeps_its_values(tmp_path):
    model = model_of("llama", tie_word_embeddings=True)
    done = export_onnx(
        merged_checkpoint(tmp_path / "m", "causal-lm", model), tmp_path / "o", head="int8"
    )
    table = model.get_input_embeddings().weight.detach().numpy()
    _, head = head_of(done)
    np.testing.assert_array_equal(
        graph_weights(done.path / "model.onnx")["model.embed_tokens.weight"](), table
    )
    assert 1e-3 < np.linalg.norm(head - table) / np.linalg.norm(table) < 1e-2


@pytest.mark.exhaustive
def test_adapters_are_swapped_over_it(python_base, python_run, tmp_path):
    done = export_adapters(python_base, [f"first={python_run}"], tmp_path / "both", head="int8")
    options = done.manifest.lineage[-1].options
    assert (options["head"], done.manifest.tag[-9:]) == ("int8", "_headint8")
    entry = done.manifest.adapters["first"]
    assert entry.lineage[-1].options["head_rounded"] == options["head_rounded"]
    assert verify(done.path, adapter="first").passed


def test_a_head_that_loses_too_much_is_refused(merged, tmp_path, monkeypatch):
    limits = {"8-bit inputs": 1e-2, "an 8-bit head": 1e-6, "float16": 1e-6}
    monkeypatch.setattr("qlx.verification.thresholds.UNIT_ROUNDOFF", limits)
    with pytest.raises(CheckFailed, match=r"relative.*export it without --head int8"):
        export_onnx(merged["causal-lm"], tmp_path / "out", head="int8")
    with pytest.raises(CheckFailed, match=r"without --precision fp16 and --head int8"):
        export_onnx(merged["causal-lm"], tmp_path / "out", head="int8", precision="fp16")
    assert list(tmp_path.iterdir()) == []


def test_only_a_plain_head_of_a_language_model_is_packed(merged, tmp_path):
    with pytest.raises(UsageError, match="for language models; this is one for image-class"):
        export_onnx(merged["image-classification"], tmp_path / "out", head="int8")
    with pytest.raises(UsageError, match="head 'int3' is not one of int8"):
        export_onnx(merged["causal-lm"], tmp_path / "out", head="int3")
    assert list(tmp_path.iterdir()) == []
    model = model_of("llama", hidden_size=72, num_attention_heads=3, num_key_value_heads=3)
    assert 1e-3 < pack_head(model) < 1e-2
    assert model.lm_head.block_size == 128  # a row has one scale: no shorter group divides it
    with pytest.raises(Unsupported, match="of type Linear; this model's is IntegerMatMul"):
        pack_head(model)
    model.set_output_embeddings(None)
    with pytest.raises(Unsupported, match="this model's is none"):
        pack_head(model)
    assert isinstance(model.model.embed_tokens, torch.nn.Embedding)
