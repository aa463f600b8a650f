"""Opening: whatever is not what the manifest says never reaches onnxruntime."""

import json
import shutil

import onnx
import pytest

from qlx.checkpoint import bytes_digest, open_checkpoint, seal
from qlx.errors import CorruptCheckpoint, InputRefused, UnsafeInput, Unsupported
from qlx.runtime import check_graph, open_model


@pytest.fixture
def copy(llama, tmp_path):
    """A copy of the exported Llama that may be damaged."""
    shutil.copytree(llama[0].path, tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(directory, change):
    """Edit the graph with `change`, and seal the result as a careful attacker would."""
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    change(model)
    (directory / "model.onnx").write_bytes(model.SerializeToString())
    seal(directory, open_checkpoint_unchecked(directory))


def open_checkpoint_unchecked(directory):
    from qlx.checkpoint import read_manifest

    return read_manifest(directory)[0]


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "genai_config.json"])
def test_one_changed_byte_is_refused_by_name(copy, name):
    open_model(copy)
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(CorruptCheckpoint, match=name):
        open_model(copy)


def test_a_torch_checkpoint_is_refused(llama):
    merged = llama[0].path.parent / "merged-causal-lm"
    with pytest.raises(InputRefused, match="export-onnx"):
        open_model(merged)


def test_foreign_operators_are_refused(copy):
    def change(model):
        model.graph.node[0].domain = "evil.ops"

    rewrite(copy, change)
    with pytest.raises(UnsafeInput, match=r"evil\.ops"):
        open_model(copy)


def test_foreign_operators_in_a_branch_are_refused(copy):
    def change(model):
        inner = onnx.helper.make_graph(
            [onnx.helper.make_node("Run", [], ["y"], domain="evil.ops")], "g", [], []
        )
        model.graph.node[0].attribute.append(onnx.helper.make_attribute("body", inner))

    rewrite(copy, change)
    with pytest.raises(UnsafeInput, match=r"evil\.ops"):
        open_model(copy)


def test_local_functions_are_refused(copy):
    def change(model):
        model.functions.append(onnx.helper.make_function("", "f", [], [], [], []))

    rewrite(copy, change)
    with pytest.raises(UnsafeInput, match="local functions"):
        open_model(copy)


@pytest.mark.parametrize("location", ["../../etc/passwd", "/etc/passwd", "other.data", ""])
def test_weights_outside_the_directory_are_refused(copy, location):
    def change(model):
        external(model)[0].value = location

    rewrite(copy, change)
    with pytest.raises(UnsafeInput, match="does not list"):
        open_model(copy)


def external(model):
    """External-data entries (location, offset, length) of the first weight that lies outside."""
    return next(item.external_data for item in model.graph.initializer if item.external_data)


@pytest.mark.parametrize("entry", [1, 2])
def test_weights_beyond_the_end_of_the_file_are_refused(copy, entry):
    def change(model):
        external(model)[entry].value = str(10**12)

    rewrite(copy, change)
    with pytest.raises(CorruptCheckpoint):
        open_model(copy)


def test_declared_sizes_must_be_the_actual_ones(copy):
    def change(model):
        item = next(item for item in model.graph.initializer if item.external_data)
        item.dims[0] = 2**40

    rewrite(copy, change)
    with pytest.raises(CorruptCheckpoint, match="claims"):
        open_model(copy)


@pytest.mark.parametrize("data", [b"\xff" * 40, b"\x3a\xff\x01", b"not an onnx file at all"])
def test_bytes_that_are_no_graph_are_refused(data):
    with pytest.raises(CorruptCheckpoint, match=r"model\.onnx"):
        check_graph(data, "model.onnx", {})


def test_every_truncation_is_refused_or_harmless(copy):
    data = (copy / "model.onnx").read_bytes()
    files = {"model.onnx.data": (copy / "model.onnx.data").stat().st_size}
    assert check_graph(data, "model.onnx", files).external
    for length in range(0, len(data), 997):
        try:
            facts = check_graph(data[:length], "model.onnx", files)
        except CorruptCheckpoint:
            continue
        assert not facts.external or length == len(data)


def test_a_graph_onnxruntime_cannot_run_gives_its_reason(copy):
    def change(model):
        model.graph.node[0].op_type = "NoSuchOperator"

    rewrite(copy, change)
    with pytest.raises(Unsupported, match="onnxruntime"):
        open_model(copy)


def test_a_missing_context_length_is_named(copy):
    from qlx.runtime import TextGenerator

    config = json.loads((copy / "genai_config.json").read_text())
    del config["model"]["context_length"]
    (copy / "genai_config.json").write_text(json.dumps(config))
    seal(copy, open_checkpoint_unchecked(copy))
    assert open_checkpoint(copy).digest != bytes_digest(b"")
    with pytest.raises(CorruptCheckpoint, match="context_length"):
        TextGenerator(copy)
