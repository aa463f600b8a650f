"""Every target of `qlx pack` on the quickstart's two models: bits a weight, size, and what survives.

    make quickstart && python benchmarks/packing.py        # about a minute
    python benchmarks/packing.py --models DIR              # where the quickstart's output lies
    python benchmarks/packing.py --only speed --gptq-python PEER/bin/python      # beside GPTQModel, in its own venv

Bits are those of codes and scales in the files, beside those of theory; bytes are of the whole directory
without its probe. Retention is of the adapter's effect on the probe's outputs (1 - KL to the unmerged model /
KL of the base), and of its weight change. A result below the default gate of 0.9 is measured all the same and
marked. Speed is of one thread on one matrix of 2048 x 2048, the codec alone, qlx's beside those of bitsandbytes and
the package gguf in the same run. With `--gptq-python` or `--llmcompressor-python` the language model is compensated
(GPTQ, int4, groups of 64) by qlx and by GPTQModel or llm-compressor with the same training rows, one thread each, and
all are judged by the rows that the recipe holds out; seconds are those of the processor. The tables go to standard
output, everything to benchmarks/output/packing.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlx.checkpoint import Checkpoint, QuantSpec, open_checkpoint
from qlx.errors import CheckFailed, Unsupported
from qlx.packing import GGUF_TYPES, TARGETS, WHOLE, Healing, pack
from qlx.packing.healing.data import calibration_data
from qlx.quant import fitted_ternary, quantize_tensor, stored_quantization
from qlx.verification import Tally
from qlx.weights import open_weights, read_tensors

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
MODELS = {"vision": "digits-base", "language": "python-base"}
RECIPE = ROOT / "recipes/python-qlora.yaml"
GATE = 0.9
SCALE = 32  # bits, as these models are in float32
GGUF_BITS = {"F16": 16, "BF16": 16, "Q8_0": 8.5, "Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q5_1": 6,
             "TQ1_0": 1.6875, "TQ2_0": 2.0625}  # fmt: skip


BEFORE = """
import json, sys, time
import numpy as np, torch
model, file, output = sys.argv[1:]
torch.set_num_threads(1)
rows = np.load(file)
real = [torch.from_numpy(ids[mask > 0]).long() for ids, mask in zip(rows["ids"], rows["mask"])]
"""
AFTER = """
with torch.inference_mode():
    made = {name: again(input_ids=torch.from_numpy(rows[name]), attention_mask=torch.from_numpy(
        rows[name.replace("ids", "mask")])).logits.float().numpy() for name in rows if name.startswith("eval_ids")}
np.savez(output, **made)
print()
print(json.dumps(seconds))
"""
PEERS = {
    "GPTQModel": """
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in real]
config = QuantizeConfig(bits=4, group_size=64, sym=True, desc_act=False, device="cpu")
loaded = GPTQModel.load(model, config)
start = time.process_time()
loaded.quantize(data, batch_size=16, calibration_data_min_length=1)
seconds = time.process_time() - start
loaded.save(output + "-model")
again = GPTQModel.load(output + "-model", backend=BACKEND.TORCH, device="cpu").model
""",
    "llm-compressor": """
import transformers
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
again = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
data = Dataset.from_dict({"input_ids": [r.tolist() for r in real], "attention_mask": [[1] * len(r) for r in real]})
weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=64)
scheme = QuantizationScheme(targets=["Linear"], weights=weights)
recipe = GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"])
start = time.process_time()
oneshot(model=again, dataset=data, recipe=recipe, num_calibration_samples=len(real), max_seq_length=512)
seconds = time.process_time() - start
""",
}
"""What the peers do, each in a Python of its own, with `model` and the rows of `file`: GPTQ to int4 in groups of 64."""


def cases(kind: str) -> list[dict[str, Any]]:
    """The options of every pack to measure."""
    plain = [{"to": to} for to in TARGETS if to != "gguf"]
    coarse = [{"to": to, "group_size": WHOLE} for to in ("int4", "ternary")]
    fine = [{"to": "int4", "group_size": 32}, {"to": "nf4", "double_quant": False}]
    files = [{"to": "gguf", "gguf_type": name} for name in GGUF_TYPES]
    return [*plain, *fine, *coarse, *(files if kind == "language" else [])]


def bits(made: Checkpoint) -> float:
    """Measured bits a packed weight takes in the files, codes and scales."""
    spec = made.manifest.quantization
    if spec.backend == "gguf":
        import gguf

        kind = spec.extras["gguf_type"]
        tensors = gguf.GGUFReader(made.path / "model.gguf").tensors
        packed = [t for t in tensors if t.tensor_type.name == kind and t.name.startswith("blk.")]
        return 8 * sum(int(t.n_bytes) for t in packed) / sum(int(t.n_elements) for t in packed)
    stored = stored_quantization(json.loads((made.path / "config.json").read_text()))
    assert stored is not None
    files, tensors = open_weights(made.path), read_tensors(made.path)
    stated = (".quant_map", ".nested_quant_map", ".weight_shape")  # small, and not of each weight
    size = count = 0
    for name in spec.tensors:
        parts = [p for p in stored.part_names(name) if p in files]
        kept = [p for p in parts if not p.endswith(stated) and "quant_state" not in p]
        size += sum(tensors[part].nbytes for part in kept)
        count += stored.read({part: tensors[part] for part in parts}, name).count
    return 8 * size / count


def theory(made: Checkpoint) -> float | None:
    """Bits a weight by the layout; None where a scale serves a row, whose width differs."""
    spec = made.manifest.quantization
    if spec.backend == "gguf":
        return GGUF_BITS[str(spec.extras["gguf_type"])]
    assert spec.weight_bits is not None
    if spec.double_quant and spec.group_size:
        return spec.weight_bits + (8 + SCALE / 256) / spec.group_size
    whole = 0.0 if spec.scheme == "ternary" else None
    share = SCALE / spec.group_size if spec.group_size else whole
    return None if share is None else spec.weight_bits + share


def measured(source: Path, base: Path, target: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One pack, as a row of the table."""
    row: dict[str, Any] = dict(options)
    try:
        made = pack(source, target, base=base, min_retention=0, **options)
    except (CheckFailed, Unsupported) as error:
        return row | {"refused": str(error)}
    files = [file for file in target.iterdir() if file.name != "probe.safetensors"]
    result = next(r for r in made.manifest.probe.results if r.step == "pack")  # type: ignore[union-attr]
    return row | {
        "bits": bits(made),
        "theory": theory(made),
        "bytes": sum(file.stat().st_size for file in files),
        "retention": result.metrics["retention"],
        "weights": made.manifest.lineage[-1].options["weight_retention"],
        "kl": result.metrics["kl_mean"],
        "top1": result.metrics["top1"],
    }


def line(row: dict[str, Any]) -> str:
    """A row in Markdown."""
    name = " ".join(
        str(value) for value in (row["to"], row.get("group_size"), row.get("gguf_type")) if value
    )
    name += " plain scales" if row.get("double_quant") is False else ""
    if "refused" in row:
        below = "retention" in row["refused"]
        reason = "retention below 0" if below else "no layer is as wide as its blocks"
        return f"| {name} | refused: {reason} | | | | | | |"
    wanted = "–" if row["theory"] is None else f"{row['theory']:.3f}"
    kept = f"{row['retention']:.1%}" + ("" if row["retention"] >= GATE else " ✗")
    return (
        f"| {name} | {row['bits']:.3f} | {wanted} | {row['bytes'] / 1e6:.2f} | {kept} | {row['weights']:.1%} "
        f"| {row['kl']:.2g} | {row['top1']:.1%} |"
    )


def codecs() -> dict[str, Callable[[torch.Tensor], object]]:
    """What quantizes a matrix, by scheme and by whose it is."""
    import gguf
    from bitsandbytes.functional import quantize_4bit

    def ours(scheme: Any, double: bool = False) -> Callable[[torch.Tensor], object]:
        spec = QuantSpec(scheme=scheme, group_size=64, double_quant=double)
        return lambda weight: quantize_tensor(weight, spec)

    def fitted(weight: torch.Tensor) -> object:
        return fitted_ternary(
            quantize_tensor(weight, QuantSpec(scheme="ternary", group_size=64)), weight
        )  # type: ignore[arg-type]

    def theirs(kind: str) -> Callable[[torch.Tensor], object]:
        return lambda weight: gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])

    return {
        "nf4, qlx": ours("nf4"),
        "nf4, bitsandbytes": lambda weight: quantize_4bit(weight, blocksize=64, quant_type="nf4"),
        "nf4 double, qlx": ours("nf4", double=True),
        "int8, qlx": ours("int8"),
        "int4, qlx": ours("int4"),
        "ternary, qlx": fitted,
        **{f"{kind}, gguf": theirs(kind) for kind in ("Q8_0", "Q4_0", "Q5_1", "TQ2_0")},
    }


def speeds() -> dict[str, float]:
    """Million weights a second of every codec, one thread, median of five."""
    torch.set_num_threads(1)
    weight = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0)) / 45
    found = {}
    for name, codec in codecs().items():
        codec(weight)
        times = []
        for _ in range(5):
            start = time.process_time()
            codec(weight)
            times.append(time.process_time() - start)
        found[name] = weight.numel() / statistics.median(times) / 1e6
    return found


def compensation(models: Path, peers: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """GPTQ of the language model by qlx and by others: weights a second, and how far they are."""
    from benchmarks.healing import Judge

    root = models / "language"
    judge = Judge(root / "merged", root / "python-qlora", root / "python-base")
    with tempfile.TemporaryDirectory() as scratch:
        weights = 0
        for way, healing in [("rounded, qlx", None), ("GPTQ, qlx", Healing(RECIPE, steps=0))]:
            marks: list[tuple[str, float]] = []
            target = Path(scratch, way)
            made = pack(
                root / "merged", target, to="int4", base=root / "python-base", healing=healing, min_retention=0,
                report=lambda line, marks=marks: marks.append((line, time.process_time())),
            )  # fmt: skip
            first = next((at for line, at in marks if line.startswith("healing by")), None)
            last = next((at for line, at in reversed(marks) if line.startswith("compensated")), 0.0)
            tensors = read_tensors(root / "merged", made.manifest.quantization.tensors)
            weights = sum(tensor.numel() for tensor in tensors.values())
            speed = None if first is None else weights / (last - first) / 1e6
            yield {"way": way, "speed": speed} | judge.compare(target)
        for name, python in peers.items():
            seconds, logits = _by_peer(name, python, root / "merged", judge, Path(scratch))
            speed = weights / seconds / 1e6
            yield {"way": f"GPTQ, {name}", "speed": speed} | _judged(judge, logits)


def _by_peer(
    name: str, python: Path, merged: Path, judge: Any, scratch: Path
) -> tuple[float, list[Any]]:
    """Seconds that a peer takes for GPTQ, and its logits for the judge's batches."""
    rows, output = scratch / "rows.npz", scratch / f"{name}.npz"
    data = calibration_data(open_checkpoint(merged), merged, RECIPE, 0, _vocabulary(merged))
    given = {f"eval_ids{at}": batch.inputs["input_ids"] for at, batch in enumerate(judge.batches)}
    for at, batch in enumerate(judge.batches):
        given[f"eval_mask{at}"] = batch.inputs["attention_mask"]
    np.savez(rows, **_joined(data.rows), **given)
    done = subprocess.run(
        [python, "-c", BEFORE + PEERS[name] + AFTER, merged.resolve(), rows, output],
        capture_output=True, text=True, check=False, cwd=scratch,
        env=os.environ | {"GPTQMODEL_CPU_WORKERS": "2", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    made = np.load(output)
    logits = [made[f"eval_ids{at}"] for at in range(len(judge.batches))]
    return float(done.stdout.splitlines()[-1]), logits


def _judged(judge: Any, logits: list[Any]) -> dict[str, float]:
    """Distances of a peer's outputs, as `Judge.compare` has them of a checkpoint."""
    tally = Tally()
    for batch, wanted, given, off in zip(
        judge.batches, judge.wanted, logits, judge.off, strict=True
    ):
        tally.add(wanted, given, batch.inputs["attention_mask"].astype(bool), off)
    return tally.comparison().metrics()


def _vocabulary(merged: Path) -> int:
    """The size of the vocabulary."""
    return int(json.loads((merged / "config.json").read_text())["vocab_size"])


def _joined(batches: Any) -> dict[str, Any]:
    """Batches of texts as one array each of ids and mask, padded behind."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)

    def one(name: str) -> Any:
        parts = [batch[name].numpy() for batch in batches]
        return np.concatenate([np.pad(p, ((0, 0), (0, longest - p.shape[1]))) for p in parts])

    return {"ids": one("input_ids"), "mask": one("attention_mask")}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--models", type=Path, default=Path("quickstart-output"))
    parser.add_argument(
        "--only", choices=["targets", "speed"], help="one part of it (default: both)"
    )
    parser.add_argument("--gptq-python", type=Path, help="a Python with GPTQModel")
    parser.add_argument("--llmcompressor-python", type=Path, help="a Python with llm-compressor")
    arguments = parser.parse_args()
    models = arguments.models
    if not models.is_dir():
        parser.exit(0, f"{models}: not there; run `make quickstart` first, or give --models\n")
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, base in MODELS.items() if arguments.only != "speed" else ():
        print(f"\n{kind}\n\n| target | bits | theory | MB | retention | of weights | KL | top-1 |")
        print("|---|---|---|---|---|---|---|---|")
        with tempfile.TemporaryDirectory() as scratch:
            found[kind] = []
            for at, options in enumerate(cases(kind)):
                merged, target = models / kind / "merged", Path(scratch, str(at))
                row = measured(merged, models / kind / base, target, options)
                found[kind].append(row)
                print(line(row), flush=True)
    if arguments.only != "targets":
        found["speed"] = [speeds()]
        print("\nspeed\n\n| codec | million weights a second |\n|---|---|")
        for name, speed in found["speed"][0].items():
            print(f"| {name} | {speed:.0f} |")
    peers = {"GPTQModel": arguments.gptq_python, "llm-compressor": arguments.llmcompressor_python}
    if peers := {name: python for name, python in peers.items() if python is not None}:
        found["compensation"] = []
        print(
            "\nint4\n\n| way | million weights a second | KL | top-1 | retention |\n|---|---|---|---|---|"
        )
        for row in compensation(models, peers):
            found["compensation"].append(row)
            speed = "" if row["speed"] is None else f"{row['speed']:.2f}"
            kept = f"{row['top1']:.1%} | {row['retention']:.1%}"
            print(f"| {row['way']} | {speed} | {row['kl_mean']:.2g} | {kept} |", flush=True)
    output = Path(__file__).parent / "output"
    output.mkdir(exist_ok=True)
    (output / "packing.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
