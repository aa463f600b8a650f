"""llama.cpp itself runs what was written; compiled for long, so only where llama-cpp-python is installed."""

import json
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from qlx.checkpoint import read_probe
from qlx.packing import pack
from qlx.packing.gguf import gguf_spec, write_gguf
from qlx.packing.select import select_modules
from qlx.packing.source import WholeWeights
from qlx.training import save_adapter
from qlx.weights import open_weights
from tests import adapter_support
from tests.adapter_support import NONE, Case, flip_rows, make_adapter, make_base
from tests.isolation import run_without
from tests.packing.conftest import TERNARY, wide_llama

pytestmark = pytest.mark.exhaustive

TIED = ("qwen3", "gemma", "gemma2", "gemma3_text")
CASES = [(kind, "F16") for kind in ("llama", "mistral", "qwen2", *TIED)]
CASES += [("llama", to) for to in ("BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")]


CODE = """
import llama_cpp, numpy
model, rows, target, *lora = argv

plain = llama_cpp.llama_cpp.llama_model_default_params
def without_repacking():
    given = plain()
    given.use_extra_bufts = False  # its AMX kernels crash on some machines (llama.cpp issue 20824)
    return given
llama_cpp.llama_cpp.llama_model_default_params = without_repacking

given = numpy.load(rows)
model = llama_cpp.Llama(
    model, n_ctx=32, logits_all=True, verbose=False, n_threads=1, lora_path=lora[0] if lora else None
)
found = []
for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True):
    model.reset()
    model.eval(ids[mask.astype(bool)].tolist())
    found.append(numpy.array(model.scores[: int(mask.sum())]))
numpy.save(target, numpy.concatenate(found))
result = sum(map(len, found))
"""


def outputs(path, probe, lora=None):
    """Logits of the probe's real tokens, row after row, by llama.cpp alone; `lora` is an adapter's file."""
    if find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python compiles for long")
    with tempfile.TemporaryDirectory() as scratch:
        rows, target = Path(scratch, "rows.npz"), Path(scratch, "logits.npy")
        np.savez(rows, **probe.inputs)
        more = () if lora is None else (lora,)
        count = run_without(("qlx", "torch", "transformers"), CODE, path, rows, target, *more)
        assert count == probe.mask.sum()
        return np.load(target)


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


@pytest.mark.parametrize("to", ["TQ1_0", "TQ2_0"])
def test_ternary_types_agree(tmp_path, monkeypatch, to):
    monkeypatch.setattr(adapter_support, "draw", flip_rows)
    base = wide_llama(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", Case("llama", TERNARY))
    made = pack(adapter.path, tmp_path / "p", to="gguf", gguf_type=to, base=base)
    probe = read_probe(made.path)
    given = outputs(made.path / "model.gguf", probe)
    far = [
        np.linalg.norm(given - wanted[probe.mask]) / np.linalg.norm(wanted[probe.mask])
        for wanted in (probe.own, probe.base)
    ]
    assert far[0] < 3e-2
    assert far[1] > 10 * far[0]


# --- Adapters beside their base


def base_in_gguf(base, adapter, target):
    """A base alone as a file of float16 (norms float32)."""
    target.mkdir()
    weights, spec = WholeWeights(open_weights(base), adapter.manifest, None), gguf_spec("F16", NONE)
    selection = select_modules(weights, base, adapter.manifest, spec.group_size)
    spec = spec.model_copy(update={"tensors": tuple(selection.tensors.values())})
    write_gguf(target, weights, base, selection, spec, "base")
    return target / "model.gguf"


def with_alpha(file, target, alpha):
    """The same adapter file with another alpha."""
    gguf = pytest.importorskip("gguf")
    shutil.copy(file, target)
    field = gguf.GGUFReader(target, "r+").fields["adapter.lora.alpha"]
    field.parts[field.data[0]][0] = alpha
    return target


RS = {"use_rslora": True}
PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 24}}
ADAPTERS = [(kind, {}) for kind in ("llama", "mistral", "qwen2", *TIED)]
ADAPTERS += [(kind, RS) for kind in ("llama", "qwen3")] + [("llama", RS | PATTERNS)]


@pytest.mark.parametrize(("kind", "options"), ADAPTERS)
def test_an_adapter_beside_its_base_gives_what_peft_gives(tmp_path, kind, options):
    """The probe's reference is PEFT's own model, unmerged, in float32; the base's file is in float16."""
    base = make_base(tmp_path / "base", kind, tied=kind in TIED)
    case = Case(kind, NONE, options={"rank": 4, "alpha": 6.0, **options})
    adapter = make_adapter(base, tmp_path / "adapter", case)
    done = save_adapter(adapter.path, tmp_path / "with", gguf=True)
    file, probe = done.path / "adapter.gguf", read_probe(done.path)
    whole = base_in_gguf(base, adapter, tmp_path / "gguf")

    def far(wanted, lora=None):
        wanted = wanted[probe.mask]
        return np.linalg.norm(outputs(whole, probe, lora) - wanted) / np.linalg.norm(wanted)

    assert far(probe.base) < 2e-3
    found = far(probe.reference, file)
    assert found < 2e-3
    assert far(probe.reference) > 10 * found  # without the adapter
    if options:
        raw = json.loads((done.path / "adapter_config.json").read_text())["lora_alpha"]
        plain = with_alpha(
            file, tmp_path / "raw.gguf", raw
        )  # as llama.cpp's own converter writes it
        assert far(probe.reference, plain) > 10 * found
