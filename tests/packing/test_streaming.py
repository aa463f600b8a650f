"""Packing goes tensor by tensor: memory does not grow with the model, and a kill leaves nothing to find."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.generated import LINEAR, Size, make_adapter, make_model
from qlx.packing import pack
from qlx.weights import open_weights

ROOT = Path(__file__).parents[2]
MIB = 2**20
SIZES = {
    "small": Size(layers=2, hidden=1024, intermediate=2816, heads=16, kv_heads=4, vocabulary=4000),
    "large": Size(layers=10, hidden=1024, intermediate=2816, heads=16, kv_heads=4, vocabulary=4000),
}

ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""What is freed goes back at once, so that marks show what was held and not what malloc kept."""

MEASURE = """
import json, sys
from pathlib import Path

def mark(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

import transformers.models.llama.modeling_llama, gguf
from qlx.packing import pack, writer
from qlx.verification.prove import sealed
base, adapter, output, to, way = sys.argv[1:]
if way == "unproven":  # the proof runs the packed model, whose size it is
    sys.modules["qlx.packing.pack"].prove = lambda staging, manifest, **given: sealed(staging, manifest)
writer.ShardWriter.__init__.__defaults__ = (8 * 2**20,)
held = mark("VmRSS")
if way == "naive":
    from qlx.weights import read_tensors
    tensors = {name: value.float() for name, value in read_tensors(Path(base)).items()}
elif way == "load":
    from qlx.models import load_base
    load_base(Path(output), "causal-lm")
else:
    pack(Path(adapter), Path(output), to=to, base=base, min_retention=0)
print(json.dumps(mark("VmHWM") - held))
"""

KILL = """
import os, signal, sys
from pathlib import Path
from qlx.packing import pack

def killed(line):
    if "replaying" in line:
        os.kill(os.getpid(), signal.SIGKILL)

pack(Path(sys.argv[1]), Path(sys.argv[2]), to=sys.argv[3], report=killed, min_retention=0)
"""


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=280, check=False, env=os.environ | ALLOCATOR,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Bases of 66 and 266 MB in bf16 with an adapter on all layers."""
    root = tmp_path_factory.mktemp("streaming")
    return {
        name: (base := make_model(root / name, size), make_adapter(root / f"{name}-a", base, size, LINEAR))
        for name, size in SIZES.items()
    }  # fmt: skip


def growth(made, name, target, to, way="unproven"):
    done = run(MEASURE, *made[name], target, to, way)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def grown(made, part):
    """How much more there is of the large one in bytes: of its weights or of its adapter."""
    sizes = [
        sum(i.nbytes for i in open_weights(made[n][0]).values())
        if part == "weights"
        else (made[n][1] / "adapter_model.safetensors").stat().st_size
        for n in ("large", "small")
    ]
    return sizes[0] - sizes[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "to", [pytest.param(to, marks=pytest.mark.exhaustive) for to in ("ternary", "gguf")] + ["int4"]
)
def test_memory_grows_by_the_adapter_and_not_by_the_model(tmp_path, made, to):
    small, large = (growth(made, name, tmp_path / name, to) for name in ("small", "large"))
    assert large - small - grown(made, "adapter") < grown(made, "weights") / 5
    assert large < 250 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_the_model_would_be_seen(tmp_path, made):
    small, large = (growth(made, n, tmp_path / n, "int4", "naive") for n in ("small", "large"))
    assert large - small > grown(made, "weights")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.exhaustive
def test_the_proof_loads_packed_layers_without_unpacking_them(tmp_path, made):
    growth(made, "large", tmp_path / "packed", "int4")
    packed = growth(made, "large", tmp_path / "packed", "int4", "load")
    unpacked = 2 * sum(info.nbytes for info in open_weights(made["large"][0]).values())  # fp32
    assert packed < unpacked / 2


@pytest.mark.parametrize("to", ["int4", "gguf"])
def test_a_kill_leaves_no_output_and_its_rest_goes_with_the_next(tmp_path, merged, to):
    target = tmp_path / "packed"
    done = run(KILL, merged["llama"].path, target, to)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert not target.exists()
    assert all(name.startswith(".qlx-packed-") for name in os.listdir(tmp_path))
    pack(merged["llama"].path, target, to=to, min_retention=0)
    assert os.listdir(tmp_path) == ["packed"]
