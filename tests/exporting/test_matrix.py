"""Every cell of docs/onnx-matrix.md, made for real."""

import pytest

from qlx.checkpoint import read_probe
from qlx.errors import Unsupported
from qlx.runtime import OnnxPredictor
from qlx.verification import compare, verify
from tests.exporting.matrix import ARCHITECTURES, DOCUMENT, FORMS, document, export

DEFAULT = {("Phi-3", "int4"), ("Gemma 3", "fp32")}
CELLS = [
    pytest.param(
        row,
        form,
        id=f"{row.name}-{form}",
        marks=[] if (row.name, form) in DEFAULT else [pytest.mark.exhaustive],
    )
    for row in ARCHITECTURES
    for form in FORMS
]


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    """{architecture: a directory for its checkpoints}."""
    return {row.name: tmp_path_factory.mktemp("matrix") for row in ARCHITECTURES}


@pytest.mark.parametrize(("row", "form"), CELLS)
def test_a_cell_is_what_the_document_says(rooms, row, form):
    if form in row.refused:
        with pytest.raises(Unsupported, match="can be packed"):
            export(row, form, rooms[row.name])
        return
    done = export(row, form, rooms[row.name])
    assert verify(done.path).passed
    probe = read_probe(done.path)
    expected = probe.reference if form in ("fp32", "fp16") else probe.own
    outputs = OnnxPredictor(done.path, threads=1).predict(probe.inputs)
    limit = 4e-3 if form == "fp16" else 1e-4
    assert compare(expected, outputs, probe.mask).relative < limit
    shifted = {name: values[::-1].copy() for name, values in probe.inputs.items()}
    other = OnnxPredictor(done.path, threads=1).predict(shifted)
    assert compare(expected, other, probe.mask).relative > limit  # the outputs depend on the inputs


def test_the_document_is_current():
    assert DOCUMENT.read_text() == document()
    assert len({row.model_type for row in ARCHITECTURES}) >= 12
