"""Every target of `qlx pack` on the quickstart's two models: bits a weight, size, and what survives.

    make quickstart && python benchmarks/packing.py        # about a minute
    python benchmarks/packing.py --models DIR              # where the quickstart's output lies

Bits are those of codes and scales in the files, beside those of theory; bytes are of the whole directory
without its probe. Retention is of the adapter's effect on the probe's outputs (1 - KL to the unmerged model /
KL of the base), and of its weight change. A result below the default gate of 0.9 is measured all the same and
marked. Speed is of one thread on one matrix of 2048 x 2048, the codec alone, qlx's beside those of bitsandbytes and
the package gguf in the same run. The tables go to standard output, everything to benchmarks/output/packing.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qlx.checkpoint import Checkpoint, QuantSpec
from qlx.errors import CheckFailed, Unsupported
from qlx.packing import GGUF_TYPES, TARGETS, WHOLE, pack
from qlx.quant import fitted_ternary, quantize_tensor, stored_quantization
from qlx.weights import open_weights, read_tensors

MODELS = {"vision": "digits-base", "language": "python-base"}
GATE = 0.9
SCALE = 32  # bits, as these models are in float32
GGUF_BITS = {"F16": 16, "BF16": 16, "Q8_0": 8.5, "Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q5_1": 6,
             "TQ1_0": 1.6875, "TQ2_0": 2.0625}  # fmt: skip


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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--models", type=Path, default=Path("quickstart-output"))
    models = parser.parse_args().models
    if not models.is_dir():
        parser.exit(0, f"{models}: not there; run `make quickstart` first, or give --models\n")
    found = {}
    for kind, base in MODELS.items():
        print(f"\n{kind}\n\n| target | bits | theory | MB | retention | of weights | KL | top-1 |")
        print("|---|---|---|---|---|---|---|---|")
        with tempfile.TemporaryDirectory() as scratch:
            found[kind] = []
            for at, options in enumerate(cases(kind)):
                merged, target = models / kind / "merged", Path(scratch, str(at))
                row = measured(merged, models / kind / base, target, options)
                found[kind].append(row)
                print(line(row), flush=True)
    found["speed"] = [speeds()]
    print("\nspeed\n\n| codec | million weights a second |\n|---|---|")
    for name, speed in found["speed"][0].items():
        print(f"| {name} | {speed:.0f} |")
    output = Path(__file__).parent / "output"
    output.mkdir(exist_ok=True)
    (output / "packing.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
