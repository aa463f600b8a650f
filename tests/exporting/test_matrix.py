"""Every cell of docs/onnx-matrix.md, made for real."""

from itertools import pairwise

import numpy as np
import pytest

from qlx.checkpoint import read_probe
from qlx.errors import Unsupported
from qlx.runtime import CausalDecoder, OnnxPredictor, open_model
from qlx.verification import compare, verify
from tests.exporting.matrix import ARCHITECTURES, DOCUMENT, FORMS, TEXT, document, export

INPUTS = ("input_ids", "attention_mask")

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
    assert done.manifest.lineage[-1].options.get("attention", "") == row.attention
    if row.task == TEXT:
        padding_and_steps_change_nothing(done, probe, expected, limit)


def padding_and_steps_change_nothing(done, probe, expected, limit):
    """Rows padded on the left, and decoded in steps, give what they give padded on the right and at once."""
    model, (ids, mask) = open_model(done.path, 1), (probe.inputs[n] for n in INPUTS)
    starts = mask.shape[1] - mask.sum(1)
    assert sorted(set(starts)) != [0]
    places = (np.arange(mask.shape[1]) - starts[:, None]) % mask.shape[1]
    ids, mask = (np.take_along_axis(each, places, 1) for each in (ids, mask))
    reference = np.take_along_axis(expected, places[..., None], 1)
    decoder = CausalDecoder(model, len(ids))
    cuts = [0, 5, 6, 8, mask.shape[1]]
    pieces = [decoder.feed(ids[:, a:b], mask[:, a:b]) for a, b in pairwise(cuts)]
    stepped = np.concatenate(pieces, axis=1)
    whole = OnnxPredictor(model).predict({"input_ids": ids, "attention_mask": mask})
    for outputs in (stepped, whole):
        assert compare(reference, outputs, mask).relative < limit
    unmasked = OnnxPredictor(model).predict({"input_ids": ids})
    assert compare(reference, unmasked, mask).relative > limit


def test_the_document_is_current():
    assert DOCUMENT.read_text() == document()
    assert len({row.model_type for row in ARCHITECTURES}) >= 12
