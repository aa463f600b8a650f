"""Healing beside re-rounding and compensation alone, on the quickstart's two models, in one table.

    make quickstart && python benchmarks/healing.py        # about half an hour on one core
    python benchmarks/healing.py --models DIR --only language --targets int4 ternary

Adapters were trained the ordinary way, on NF4. Distances are from the unmerged model (as it was trained) on rows
that the recipe holds out: KL per position, top-1, and retention, 1 - KL / KL of the base. Healing sees the recipe's
training rows (512 of them, a quarter held out of those); `by the probe` is healing by the few rows of the probe and
what is mixed of them instead, `unmixed` by those rows alone. The table goes to standard output, everything to
benchmarks/output/healing-language.json and healing-vision.json.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from qlx.checkpoint import open_checkpoint, resolve_source
from qlx.inputs import Batch, eval_batches
from qlx.models import forward_logits, load_model
from qlx.packing import Healing, pack
from qlx.packing.healing import data
from qlx.quant import stored_quantization
from qlx.verification import Tally, recorded_data
from qlx.weights import open_weights, read_tensors

ROOT = Path(__file__).resolve().parents[1]
MODELS = {
    "language": ("python-base", "recipes/python-qlora.yaml"),
    "vision": ("digits-base", "recipes/digits-qlora.yaml"),
}
MORE, UNMIXED = "+ more bits", "by the probe, unmixed"
TARGETS = ("int8", "int4", "nf4", "ternary")
MIXES = data._MIXES
GATES = {"int4": (0.008, 0.95, 0.99), "ternary": (0.09, 0.0, 0.92)}  # KL, top-1, retention


def ways(rows: Path) -> dict[str, Healing | None]:
    """The ways to round, by name, in the order of the table."""
    return {
        "re-rounded": None,
        "GPTQ": Healing(rows, steps=0),
        "+ scales": Healing(rows, rank=0),
        "+ correction": Healing(rows),
        "by the probe": Healing(),
        UNMIXED: Healing(),
    }


class Judge:
    """The unmerged model and its base on the rows that the recipe holds out."""

    def __init__(self, merged: Path, run: Path, base: Path) -> None:
        """Run both once; `run` is the adapter as it was trained."""
        checkpoint, self.base = open_checkpoint(run), base
        self.task = checkpoint.manifest.task
        self.batches = list(self._batches(merged))
        model: Any = load_model(checkpoint, resolve_source(str(base)))
        self.wanted = [forward_logits(model, self.task, batch.inputs) for batch in self.batches]
        with model.disable_adapter():
            self.off = [forward_logits(model, self.task, batch.inputs) for batch in self.batches]

    def _batches(self, merged: Path) -> Iterator[Batch]:
        yield from eval_batches(recorded_data(open_checkpoint(merged)), merged, size=16)

    def compare(self, path: Path) -> dict[str, float]:
        """Distances of a checkpoint."""
        model, tally = load_model(open_checkpoint(path)), Tally()
        for batch, wanted, off in zip(self.batches, self.wanted, self.off, strict=True):
            mask = batch.inputs.get("attention_mask")
            given = forward_logits(model, self.task, batch.inputs)
            tally.add(wanted, given, None if mask is None else mask.astype(bool), off)
        return tally.comparison().metrics()


def bytes_per_weight(path: Path) -> float:
    """Codes and scales of the packed weights, in bytes, by their number."""
    stored = stored_quantization(json.loads((path / "config.json").read_text()))
    assert stored is not None
    files, tensors = open_weights(path), read_tensors(path)
    names = open_checkpoint(path).manifest.quantization.tensors
    found = [
        stored.read({p: tensors[p] for p in stored.part_names(name) if p in files}, name)
        for name in names
    ]
    return sum(item.nbytes for item in found) / sum(item.count for item in found)


def measured(
    judge: Judge, source: Path, scratch: Path, to: Any, way: str, healing: Healing | None
) -> dict[str, Any]:
    """One pack, as a row of the table."""
    target, start = scratch / f"{to}-{way}", time.perf_counter()
    gate = 0.9 if way == MORE else 0.0  # that of the layers which get more bits
    data._MIXES = 0 if way == UNMIXED else MIXES
    made = pack(source, target, to=to, base=judge.base, min_retention=gate, healing=healing)
    seconds = time.perf_counter() - start
    record = made.manifest.lineage[-1].options.get("healing", {})
    kept = {name: record[name] for name in ("kept", "promoted") if name in record}
    found = {"target": to, "way": way, "seconds": seconds, "bytes": bytes_per_weight(target)}
    return found | judge.compare(target) | kept


def line(row: dict[str, Any]) -> str:
    """A row in Markdown; a cross where a gate is missed."""
    kl, top1, retention = GATES.get(row["target"], (1.0, 0.0, 0.0))
    kept = f" ({row['kept']})" if "kept" in row else ""

    def cell(text: str, ok: bool) -> str:
        return text if ok else f"{text} ✗"

    return (
        f"| {row['target']} | {row['way']}{kept} | {row['bytes']:.3f} "
        f"| {cell(format(row['kl_mean'], '.2g'), row['kl_mean'] <= kl)} "
        f"| {cell(format(row['top1'], '.1%'), row['top1'] >= top1)} "
        f"| {cell(format(row['retention'], '.1%'), row['retention'] >= retention)} | {row['seconds']:.0f} |"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--models", type=Path, default=Path("quickstart-output"))
    parser.add_argument("--only", choices=list(MODELS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--ways", nargs="+", help="rows to measure, by name (default: all)")
    given = parser.parse_args()
    if not given.models.is_dir():
        parser.exit(
            0, f"{given.models}: not there; run `make quickstart` first, or give --models\n"
        )
    torch.set_num_threads(1)
    output = Path(__file__).parent / "output"
    output.mkdir(exist_ok=True)
    for kind, (base, recipe) in MODELS.items():
        if given.only not in (None, kind):
            continue
        print(
            f"\n{kind}\n\n| target | way | bytes | KL | top-1 | retention | s |\n|---|---|---|---|---|---|---|"
        )
        root, rows = given.models / kind, []
        judge = Judge(root / "merged", root / base.replace("base", "qlora"), root / base)
        with tempfile.TemporaryDirectory() as scratch:
            for to in given.targets:
                cases = ways(ROOT / recipe)
                if to == "ternary":
                    cases[MORE] = Healing(ROOT / recipe, max_bytes_per_weight=0.4)
                for way in given.ways or cases:
                    row = measured(judge, root / "merged", Path(scratch), to, way, cases[way])
                    rows.append(row)
                    print(line(row), flush=True)
        (output / f"healing-{kind}.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
