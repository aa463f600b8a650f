"""Choosing where a model runs: a device that is not there is refused, never replaced by the CPU in silence."""

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest

from qlx.checkpoint import read_probe
from qlx.cli import main
from qlx.errors import MissingExtra, UsageError
from qlx.runtime import CausalDecoder, OnnxModel, OnnxPredictor, open_model
from qlx.runtime.devices import need_device, ran_on
from qlx.serving.engine import load_engine


@pytest.fixture
def no_cuda(monkeypatch):
    """An onnxruntime built without CUDA."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])


def test_an_absent_device_is_refused_with_what_to_install(vit, no_cuda):
    with pytest.raises(MissingExtra, match="onnxruntime-gpu") as caught:
        open_model(vit[0].path, device="cuda")
    assert caught.value.exit_code == 4
    assert open_model(vit[0].path, device="cpu").device == "cpu"


def test_a_session_that_fell_back_to_the_cpu_is_refused(vit, monkeypatch):
    session = open_model(vit[0].path).session
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    need_device("cuda")
    with pytest.raises(MissingExtra, match="could not start"):
        need_device("cuda", session)


def test_an_unknown_device_is_named():
    with pytest.raises(UsageError, match="'tpu' is not one of cpu, cuda"):
        need_device("tpu")


def test_serve_refuses_in_one_line(vit, no_cuda, capsys):
    assert main(["serve", str(vit[0].path), "--device", "cuda"]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "CUDAExecutionProvider" in line


def test_other_kinds_have_no_device(llama):
    with pytest.raises(UsageError, match="for ONNX checkpoints"):
        load_engine(llama[0].path.parent / "merged-causal-lm", device="cuda")


@pytest.fixture
def bound(monkeypatch):
    """Runs as they are on a device, with the outputs' places bound; the device is the CPU."""
    calls = []

    def run(self, outputs, inputs, stay=()):
        calls.append(tuple(stay))
        return ran_on(self.session, "cpu", outputs, inputs, stay)

    monkeypatch.setattr(OnnxModel, "run", run)
    return calls


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_bound_runs_give_the_same_outputs(kind, vit, llama, monkeypatch):
    directory = {"vit": vit, "llama": llama}[kind][0].path
    probe, model = read_probe(directory), open_model(directory, threads=1)
    plain = OnnxPredictor(model).predict(probe.inputs)
    monkeypatch.setattr(
        OnnxModel,
        "run",
        lambda self, outputs, inputs, stay=(): ran_on(self.session, "cpu", outputs, inputs, stay),
    )
    assert np.array_equal(OnnxPredictor(model).predict(probe.inputs), plain)
    other = {name: np.roll(array, 1, axis=-1) for name, array in probe.inputs.items()}
    assert not np.array_equal(OnnxPredictor(model).predict(other), plain)


def test_a_cache_that_runs_return_stays_on_the_device_and_nothing_else(llama, bound):
    """As graphs of an architecture's own attention have it; a fused one can be run that way, too."""
    model = replace(open_model(llama[0].path, threads=1), fused=False)
    tokens = read_probe(llama[0].path).inputs["input_ids"][2:3, :8]
    whole = CausalDecoder(model).feed(tokens)
    stepwise = CausalDecoder(model)
    parts = [stepwise.feed(tokens[:, at : at + 1]) for at in range(8)]
    assert np.allclose(np.concatenate(parts, axis=1), whole, atol=1e-4)
    assert set(bound) == {tuple(model.outputs[1:])}


def test_the_shared_cache_lies_on_the_device(llama):
    """Its buffers are made there; on this one the device is the CPU, and a wrong name is refused by onnxruntime."""
    model = open_model(llama[0].path, threads=1)
    decoder = CausalDecoder(model)
    decoder.feed(np.ones((1, 4), np.int64))
    assert {value.device_name() for value in decoder._cache._buffers.values()} == {"cpu"}
    elsewhere = CausalDecoder(replace(model, device="nowhere"))
    with pytest.raises(Exception, match="Unsupported device type: nowhere"):
        elsewhere.feed(np.ones((1, 4), np.int64))
