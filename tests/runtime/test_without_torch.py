"""The runtime in a process where torch and transformers cannot be imported."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BARRED = """
import sys
for name in ("torch", "transformers", "peft", "bitsandbytes", "onnx", "onnx_ir"):
    sys.modules[name] = None
"""
USE = (
    BARRED
    + """
import numpy as np
from qlx.checkpoint import read_probe
from qlx.runtime import Classifier, OnnxPredictor, SamplingOptions, TextGenerator
from qlx.verification import verify
images, text = sys.argv[1:]
for directory in (images, text):
    probe = read_probe(directory)
    logits = OnnxPredictor(directory, threads=1).predict(probe.inputs)
    keep = slice(None) if probe.mask is None else probe.mask
    error = np.linalg.norm((logits - probe.reference)[keep]) / np.linalg.norm(probe.reference[keep])
    assert error < 1e-4, error
    assert verify(directory).passed
(found,) = Classifier(images).classify([np.zeros((9, 9, 3), np.uint8)])
generated = TextGenerator(text).generate("def", SamplingOptions(max_tokens=5))
print(found.label, len(generated.tokens))
"""
)


def run(script, *arguments):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_everything_runs_without_torch(vit, llama):
    done = run(USE, vit[0].path, llama[0].path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "class"


def test_torch_is_really_barred(vit):
    done = run(BARRED + "import qlx.models")
    assert done.returncode == 1
    assert "torch" in done.stderr


def test_it_starts_without_what_reads_recipes():
    """Importing yaml and the recipe's models takes time that no answer needs."""
    done = run("import sys, qlx.runtime; assert not {'qlx.recipe', 'yaml'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr
    assert run("import sys, qlx.recipe; assert 'yaml' not in sys.modules").returncode == 1


def test_what_looks_at_pictures_carries_no_tokenizer():
    """6 of some 70 MiB that a process of `qlx.runtime` begins with."""
    unused = "{'tokenizers', 'numpy.random'}"
    done = run(f"import sys, qlx.runtime; assert not {unused} & set(sys.modules)")
    assert not done.returncode, done.stderr
    assert run(f"import sys, tokenizers; assert not {unused} & set(sys.modules)").returncode == 1
