"""Peak memory of a merge, measured by the system in a process of its own.

What counts is the growth from after the imports to the highest mark: at most twice the largest
tensor and 64 MiB, whatever the size of the model.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.generated import LINEAR, Size, make_adapter, make_model, nf4_spec
from qlx.weights import open_weights

ROOT = Path(__file__).parents[2]
MIB = 2**20
SMALL = Size(layers=3, hidden=1024, intermediate=2816, heads=16, kv_heads=4, vocabulary=16000)
LARGE = Size(layers=12, hidden=1024, intermediate=2816, heads=16, kv_heads=4, vocabulary=16000)

MEASURE = """
import json, sys
from pathlib import Path

def mark(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

import torch
from qlx.merging import merge
held = mark("VmRSS")
base, adapter, output, limit, way = sys.argv[1:]
if way == "naive":
    from qlx.weights import read_tensors
    tensors = read_tensors(Path(base))
else:
    sys.modules["qlx.merging.merge"].proofs_within = lambda plan, max_ram: ["sampled rows"]
    merge(base, [Path(adapter)], Path(output), max_ram=int(limit) or None)
loaded = [name for name in ("transformers", "peft", "bitsandbytes") if name in sys.modules]
print(json.dumps({"held": held, "peak": mark("VmHWM"), "loaded": loaded}))
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Bases of 125 and 340 MB in bf16 with an adapter on all layers, one trained in NF4."""
    root = tmp_path_factory.mktemp("memory")
    found = {}
    for name, size in (("small", SMALL), ("large", LARGE)):
        base = make_model(root / name, size)
        found[name] = (base, make_adapter(root / f"{name}-adapter", base, size, LINEAR))
    spec = nf4_spec(root / "small", SMALL)
    found["nf4"] = (root / "small", make_adapter(root / "nf4", root / "small", SMALL, LINEAR, spec))
    return found


def run(pair, output, limit=0, way="merge"):
    """The marks of a process that merges; `way` naive loads the base instead."""
    arguments = [*map(str, pair), str(output), str(limit), way]
    return subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def growth(*arguments, **options):
    done = run(*arguments, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    marks = json.loads(done.stdout.splitlines()[-1])
    assert marks["loaded"] == []
    return marks["peak"] - marks["held"]


def bound(pair):
    return 2 * max(info.nbytes for info in open_weights(pair[0]).values()) + 64 * MIB


@pytest.mark.parametrize("name", ["small", "large", "nf4"])
def test_memory_stays_within_twice_the_largest_tensor_and_64_mib(tmp_path, made, name):
    assert growth(made[name], tmp_path / "merged") <= bound(made[name])


def test_a_merge_that_loads_the_model_would_exceed_it(tmp_path, made):
    assert growth(made["large"], tmp_path / "merged", way="naive") > 2 * bound(made["large"])


def test_memory_does_not_grow_with_the_model_but_by_its_adapter(tmp_path, made):
    small, large = (growth(made[name], tmp_path / name) for name in ("small", "large"))
    adapters = [
        (made[n][1] / "adapter_model.safetensors").stat().st_size for n in ("small", "large")
    ]
    weights = [sum(i.nbytes for i in open_weights(made[n][0]).values()) for n in ("small", "large")]
    grown = weights[1] - weights[0]
    assert large - small - (adapters[1] - adapters[0]) < grown / 10


def test_a_limit_is_kept_down_to_the_floor_and_refused_below(tmp_path, made):
    refused = run(made["large"], tmp_path / "merged", limit=100 * MIB)
    found = re.search(r"NoRoom: .*this merge needs (\d+) ", refused.stderr)
    assert found, refused.stderr[-2000:]
    floor = int(found[1])
    slightly_more = floor + 4 * MIB  # the process is not of the same size to the byte each time
    done = run(made["large"], tmp_path / "merged", limit=slightly_more)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["peak"] <= slightly_more
    assert (tmp_path / "merged" / "qlx.json").is_file()
