"""Exports run with plain onnxruntime and onnxruntime-genai, in processes that cannot import qlx."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from qlx.checkpoint import read_probe, write_probe

BARRED = "import sys\nfor name in ('qlx', 'torch', 'transformers'): sys.modules[name] = None\n"

PLAIN = (
    BARRED
    + """
import numpy as np, onnxruntime as ort
from safetensors.numpy import load_file
directory = sys.argv[1]
probe = load_file(directory + "/probe.safetensors")
session = ort.InferenceSession(directory + "/model.onnx", providers=["CPUExecutionProvider"])
inputs = {name[6:]: value for name, value in probe.items() if name.startswith("input.")}
shapes = {item.name: item.shape for item in session.get_inputs()}
keep = np.ones(len(probe["output.reference"]), bool)
if "input_ids" in inputs:
    keep = inputs["attention_mask"].astype(bool)
    inputs["position_ids"] = np.maximum(inputs["attention_mask"].cumsum(1) - 1, 0)
    for name, shape in shapes.items():
        if name.startswith("past_key_values"):
            inputs[name] = np.zeros((len(keep), shape[1], 0, shape[3]), np.float32)
logits = session.run(["logits"], inputs)[0][keep]
reference = probe["output.reference"][keep]
print(np.linalg.norm(logits - reference) / np.linalg.norm(reference))
"""
)

GENAI = (
    BARRED
    + """
import json, numpy as np, onnxruntime_genai as og
directory, prompt, steps = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = og.Model(directory)
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=len(prompt) + steps, do_sample=False)
generator = og.Generator(model, parameters)
generator.append_tokens(np.array([prompt], np.int32))
logits = np.asarray(generator.get_logits())[0, -1].tolist()
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps({"logits": logits, "tokens": generator.get_sequence(0).tolist()[len(prompt):]}))
"""
)

GENAI_BATCH = (
    BARRED
    + """
import json, numpy as np, onnxruntime_genai as og
directory, rows, steps = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = og.Model(directory)
parameters = og.GeneratorParams(model)
length = len(rows[0])
parameters.set_search_options(max_length=length + steps, do_sample=False, batch_size=len(rows))
generator = og.Generator(model, parameters)
generator.append_tokens(rows)
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([generator.get_sequence(at).tolist()[length:] for at in range(len(rows))]))
"""
)


def run(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("task", ["image-classification", "causal-lm"])
def test_plain_onnxruntime_reproduces_the_probe(exported, task):
    assert float(run(PLAIN, exported[task].path)) <= 1e-4


@pytest.mark.parametrize("key", [("vit", "nf4"), ("llama", "fp4")])
def test_plain_onnxruntime_reproduces_an_unmerged_adapter(separate, key):
    assert float(run(PLAIN, separate[key].path)) <= 1e-4


def test_the_comparison_sees_a_small_difference(exported, tmp_path):
    shutil.copytree(exported["causal-lm"].path, tmp_path / "copy")
    probe = read_probe(tmp_path / "copy")
    other = probe.reference + 1e-3 * np.abs(probe.reference).mean()
    write_probe(tmp_path / "copy" / "probe.safetensors", replace(probe, reference=other))
    assert float(run(PLAIN, tmp_path / "copy")) > 1e-4


def test_qlx_is_really_barred():
    with pytest.raises(AssertionError, match="qlx"):
        run(BARRED + "import qlx.errors")


def test_genai_generates_what_our_runtime_generates(exported):
    from qlx.runtime import CausalDecoder, SamplingOptions, TextGenerator

    ours = TextGenerator(exported["causal-lm"].path, threads=1)
    prompt = ours.encode("def add(first, second):")
    theirs = json.loads(run(GENAI, exported["causal-lm"].path, json.dumps(prompt), 24))
    logits = CausalDecoder(ours.model).feed(np.array([prompt]))[0, -1]
    np.testing.assert_allclose(theirs["logits"], logits, atol=1e-5)
    assert not np.allclose(theirs["logits"], logits[::-1], atol=1e-2)
    expected = ours.generate(prompt, SamplingOptions(max_tokens=24))
    assert theirs["tokens"][: len(expected.tokens)] == list(expected.tokens)


def test_genai_runs_an_unmerged_adapter_on_a_packed_base(separate):
    found = json.loads(run(GENAI, separate["llama", "fp4"].path, json.dumps([5, 6, 7, 8]), 4))
    probe = read_probe(separate["llama", "fp4"].path)
    assert len(found["logits"]) == probe.reference.shape[-1]
    assert len(found["tokens"]) >= 1


def test_genai_generates_for_a_batch_padded_on_the_right_what_it_does_for_each_row(exported):
    """Its own rule for padding: a batch padded on the left is other input to it, with any graph."""
    directory = exported["causal-lm"].path
    assert json.loads((directory / "genai_config.json").read_text())["search"][
        "past_present_share_buffer"
    ]
    long, short = [9, 40, 41, 7, 130, 12, 77], [55, 8, 200]
    pad = [0] * (len(long) - len(short))
    alone = [
        json.loads(run(GENAI_BATCH, directory, json.dumps([row]), 10))[0] for row in (long, short)
    ]
    together = json.loads(run(GENAI_BATCH, directory, json.dumps([long, short + pad]), 10))
    assert together == alone
    other = json.loads(run(GENAI_BATCH, directory, json.dumps([long, short + [9] * len(pad)]), 10))
    assert other[1] != alone[1]
