"""llama.cpp itself runs what was written; compiled for long, so only where llama-cpp-python is installed."""

import numpy as np
import pytest

from qlx.checkpoint import read_probe
from qlx.packing import pack
from tests.adapter_support import NONE, Case, make_adapter, make_base

pytestmark = pytest.mark.exhaustive

TIED = ("qwen3", "gemma", "gemma2", "gemma3_text")
CASES = [(kind, "F16") for kind in ("llama", "mistral", "qwen2", *TIED)]
CASES += [("llama", to) for to in ("BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")]


def outputs(path, probe):
    """Logits of the probe's real tokens, row after row."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python compiles for long")
    model = llama_cpp.Llama(str(path), n_ctx=32, logits_all=True, verbose=False, n_threads=1)
    rows = []
    for ids, mask in zip(probe.inputs["input_ids"], probe.inputs["attention_mask"], strict=True):
        model.reset()
        model.eval(ids[mask.astype(bool)].tolist())
        rows.append(np.array(model.scores[: int(mask.sum())]))
    return np.concatenate(rows)


@pytest.mark.parametrize(("kind", "to"), CASES)
def test_outputs_agree(tmp_path, kind, to):
    """llama.cpp rounds inputs of packed layers to 8 or 16 bits, which is most of the difference."""
    base = make_base(tmp_path / "base", kind, tied=kind in TIED)
    adapter = make_adapter(base, tmp_path / "adapter", Case(kind, NONE))
    made = pack(adapter.path, tmp_path / "p", to="gguf", gguf_type=to, base=base, min_retention=0.5)
    probe = read_probe(made.path)
    given = outputs(made.path / "model.gguf", probe)
    far = [
        np.linalg.norm(given - wanted[probe.mask]) / np.linalg.norm(wanted[probe.mask])
        for wanted in (probe.own, probe.base)
    ]
    assert far[0] < {"F16": 2e-3, "BF16": 1e-2}.get(to, 3e-2)
    assert far[1] > 10 * far[0]
