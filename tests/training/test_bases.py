"""Every architecture that qlx knows is trained on, quantized where it can be, and merged: a few steps each."""

import json

import pytest

from qlx.merging import merge
from qlx.training import train
from qlx.verification import verify
from tests.conftest import recipe_of
from tests.exporting.matrix import ARCHITECTURES, PICTURES, build
from tests.onnx_support import CLASSES, write_model

DEFAULT = ("GPT-2",)
BASES = [
    pytest.param(row, id=row.name, marks=[] if row.name in DEFAULT else [pytest.mark.exhaustive])
    for row in ARCHITECTURES
]
CONTENT = {
    "name": "few-steps",
    "base": {"path": "BASE"},
    "adapter": {"rank": 4, "alpha": 8},
    "training": {"max_steps": 4, "batch_size": 8, "learning_rate": 5e-3, "log_every": 1},
    "probe": {"count": 4, "max_length": 16},
}
TEXT = {"source": "python-docstrings", "train_limit": 64, "eval_limit": 8, "max_length": 48}
IMAGES = {"source": "digits", "train_limit": 64, "eval_limit": 16}


@pytest.mark.parametrize("row", BASES)
def test_a_few_steps_on_any_base(row, tmp_path):
    base, pictures = tmp_path / "base", row.task == PICTURES
    write_model(base, build(row), row.task)
    content = CONTENT | {"task": row.task, "data": IMAGES if pictures else TEXT}
    if pictures:  # the base tells other classes apart than the ten digits
        assert CLASSES != 10
        content["adapter"] = content["adapter"] | {"modules_to_save": ["classifier"]}
    packed = "nf4" not in row.refused
    recipe = recipe_of(content, base, quantization={"quant_type": "nf4"} if packed else None)
    run = train(recipe, tmp_path / "run")
    spec = run.manifest.adapter
    assert len(spec.tensors) >= 8
    assert len(run.manifest.quantization.modules) == (len(spec.tensors) if packed else 0)
    losses = [json.loads(line)["loss"] for line in (run.path / "metrics.jsonl").open()]
    assert len(losses) == 4
    merged = merge(base, [run.path], tmp_path / "merged")
    assert verify(merged.path).passed
    assert verify(merged.path, against=run.path, base=base).passed
