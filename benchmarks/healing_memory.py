"""Peak memory of `pack --heal` for models of the same width and 2, 10 and 20 layers, beside the bound.

    python benchmarks/healing_memory.py                              # about eight minutes on one core
    python benchmarks/healing_memory.py --layers 2 10 --targets int4 --steps 4
    python benchmarks/healing_memory.py --layers 2 10 --way held     # the control: nothing leaves memory

The models are merged ones of noise in bf16 (nothing here depends on values), with their bases, and the
calibration data are the rows of their probes. The bound is two layers in float32, the calibration data's activations
(two states of every row, the outputs of the probe, and one batch through one layer and the head) and the head itself
in float32. What is measured is the highest mark of resident memory in a process of its own above what it
had when everything was imported and a tiny model packed the same way (which touches the libraries' code), with malloc
told to give back at once what is freed. The proof at the end is left
out: it runs the packed model, whose codes it holds. The table goes to standard output, the
figures to benchmarks/output/healing-memory.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.generated import Size, make_merged, make_model

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
"""What is freed goes back at once, so that marks show what was held and not what malloc kept."""

CHILD = """
import gc, json, sys, torch
from pathlib import Path

def mark(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.set_num_threads(1)
import transformers.models.llama.modeling_llama
from qlx.packing import Healing, pack
from qlx.packing.healing import paged
from qlx.verification.prove import sealed
base, merged, tiny_base, tiny, output, to, way, steps, rank = sys.argv[1:]
sys.modules["qlx.packing.pack"].prove = lambda staging, manifest, **given: sealed(staging, manifest)
sys.modules["qlx.packing.healing.heal"]._require = lambda *given: None  # the probe is noise
healing = Healing(steps=int(steps), rank=int(rank))
pack(Path(tiny), Path(output + "-tiny"), to=to, base=tiny_base, min_retention=0, healing=healing)
if way == "held":
    for module in list(sys.modules.values()):
        if getattr(module, "release", None) is paged.release:
            module.release = lambda tensors: None
stages = []
def tell(line):
    stages.append((line, mark("VmHWM") - held))
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the highest mark begins again
held = mark("VmRSS")
pack(Path(merged), Path(output), to=to, base=base, min_retention=0, report=tell, healing=healing)
print(json.dumps({"peak": mark("VmHWM") - held, "stages": stages}))
"""


@dataclass(frozen=True)
class Case:
    """A width, the number of rows of the probe and their length, and what tuning does."""

    hidden: int = 768
    rows: int = 24
    length: int = 8
    steps: int = 6
    rank: int = 32
    vocabulary: int = 2000

    def size(self, layers: int) -> Size:
        """The shape of the model."""
        return Size(
            layers=layers,
            hidden=self.hidden,
            intermediate=self.hidden * 11 // 4,
            heads=self.hidden // 64,
            kv_heads=self.hidden // 256,
            vocabulary=self.vocabulary,
        )

    @property
    def layer(self) -> int:
        """Bytes of one layer in float32."""
        shapes = self.size(1).shapes()
        inside = [shape for name, shape in shapes.items() if name.startswith("model.layers.")]
        return 4 * sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in inside)

    @property
    def head(self) -> int:
        """Bytes of the head in float32."""
        return 4 * self.hidden * self.vocabulary

    @property
    def activations(self) -> int:
        """Bytes of the calibration data's states and outputs, and of one batch in a layer and the head.

        A layer keeps for the backward pass ten values as wide as the model and four as wide as its feed-forward
        part, of every position; the head and the loss make six as wide as the vocabulary.
        """
        states = 2 * self.rows * self.length * self.hidden
        outputs = 3 * self.rows * self.length * self.vocabulary
        inside = 10 * self.hidden + 4 * (self.hidden * 11 // 4) + 6 * self.vocabulary
        return 4 * (states + outputs + min(16, self.rows) * self.length * inside)

    @property
    def bound(self) -> int:
        """What `pack --heal` may take: two layers, the calibration data's activations, and the head."""
        return 2 * self.layer + self.activations + self.head


TINY = Case(hidden=256, rows=8, length=4, vocabulary=64)


def models(root: Path, case: Case, layers: int) -> tuple[Path, Path]:
    """A base of so many layers and a merged checkpoint of it."""
    size, place = case.size(layers), root / f"{case.hidden}-{layers}"
    base = make_model(place / "base", size)
    rows = (case.rows, case.length)
    return base, make_merged(place / "merged", base, size, rows)


def peak(made: tuple[Path, ...], output: Path, case: Case, to: str, way: str) -> dict[str, Any]:
    """Bytes at the highest mark above imports, and the marks as each line of progress was told.

    `made` are the base and the merged checkpoint of the model and of a tiny one.
    """
    arguments = [*made, output, to, way, case.steps, case.rank]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | ALLOCATOR,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 10, 20])
    parser.add_argument("--targets", nargs="+", default=["int4", "ternary"])
    parser.add_argument("--hidden", type=int, default=Case.hidden)
    parser.add_argument("--steps", type=int, default=Case.steps)
    parser.add_argument("--way", choices=["paged", "held"], default="paged")
    parser.add_argument("--verbose", action="store_true", help="marks at each line of progress")
    given = parser.parse_args()
    case = Case(hidden=given.hidden, steps=given.steps)
    print(f"a layer {case.layer / MIB:.0f} MiB, activations {case.activations / MIB:.0f}, "
          f"head {case.head / MIB:.0f}: bound {case.bound / MIB:.0f} MiB\n")  # fmt: skip
    print(
        "| target | layers | model in float32, MiB | peak, MiB | of the bound |\n|---|---|---|---|---|"
    )
    rows = []
    for layers in given.layers:
        with tempfile.TemporaryDirectory() as scratch:
            made = (*models(Path(scratch), case, layers), *models(Path(scratch), TINY, 1))
            for to in given.targets:
                found = peak(made, Path(scratch, to), case, to, given.way)
                if given.verbose:
                    for line, at in found["stages"]:
                        print(f"{at / MIB:8.1f}  {line[:100]}", file=sys.stderr)
                whole = (layers * case.layer + 2 * case.head) / MIB
                row = {"target": to, "layers": layers, "way": given.way, "bound": case.bound}
                rows.append(row | found)
                print(f"| {to} | {layers} | {whole:.0f} | {found['peak'] / MIB:.0f} "
                      f"| {found['peak'] / case.bound:.0%} |", flush=True)  # fmt: skip
    output = Path(__file__).parent / "output"
    output.mkdir(exist_ok=True)
    (output / "healing-memory.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
