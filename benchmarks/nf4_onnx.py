"""What the fast mode of NF4 and FP4 in ONNX is worth and what it costs: speed, bytes and error, measured together.

    python benchmarks/nf4_onnx.py            # a layer of 4096 x 4096, then a Llama of 0.3 B: minutes, 3 GB of memory
    python benchmarks/nf4_onnx.py --shape llama-15m --size 1024      # small, to see that it runs

Random normal weights, one set of codes each, one thread and its processor time (so that other work on the machine
matters little), all ways in turns in one process: the checkpoint's own bytes
(accuracy level 0, onnxruntime's MatMulBnb4), the same codes as 8-bit integers (level 4), and beside them int4 at
level 4 and fp32. *error* is the relative distance of outputs from those of the exact values: of the dequantized
NF4 (FP4, int4) weights in fp64 for the layer, of torch's answer for the model. *moved* is what rounding the levels did
to the weights, as `qlx export-onnx` records it. Figures go to benchmarks/output/nf4_onnx.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx_models import LLAMAS, make
from torch import nn

from qlx.checkpoint import QuantSpec, read_probe
from qlx.quant import (
    dequantize_tensor,
    packed_linears,
    packed_of_module,
    quantize_model,
    rounding_of_levels,
)
from qlx.runtime import CausalDecoder, OnnxPredictor, open_model, session_options

THREADS, PROMPT, STEPS = 1, 128, 12
WAYS = {
    "nf4, level 0": ("nf4", 0),
    "nf4, level 4": ("nf4", 4),
    "fp4, level 0": ("fp4", 0),
    "fp4, level 4": ("fp4", 4),
    "int4, level 4": ("int4", 4),
    "fp32": (None, 0),
}


def in_turns(works: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Median milliseconds of this thread for each."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            start = time.thread_time()
            work()
            if turn:
                times[name].append(1e3 * (time.thread_time() - start))
    return {name: statistics.median(each) for name, each in times.items()}


class Layer:
    """One linear layer in ONNX, and what it should compute."""

    def __init__(self, scheme: str | None, level: int, size: int, folder: Path) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(size, size, bias=False)).eval()
        nn.init.normal_(net[0].weight, std=0.02)
        self.moved = None
        if scheme is not None:
            backend = "qlx" if scheme == "int4" else "bitsandbytes"
            quantize_model(
                net,
                QuantSpec(method="qlora", scheme=scheme, group_size=64, backend=backend),
            )
            self.weight = dequantize_tensor(packed_of_module(net[0]), torch.float32)
            self.moved = rounding_of_levels(net) if level else None
            packed_linears(net, accuracy_level=level)
        else:
            self.weight = net[0].weight.detach().clone()
        self.path = folder / f"{scheme}-{level}.onnx"
        rows = {0: torch.export.Dim.DYNAMIC}
        program = torch.onnx.export(
            net, (torch.zeros(2, size),), dynamo=True, verbose=False, dynamic_shapes=(rows,)
        )
        program.model.opset_imports.setdefault("com.microsoft", 1)
        program.save(self.path)
        self.session = ort.InferenceSession(self.path, session_options(THREADS))
        self.mib = self.path.stat().st_size / 2**20
        data = Path(f"{self.path}.data")
        self.mib += data.stat().st_size / 2**20 if data.exists() else 0

    def run(self, x: Any) -> Any:
        """The product."""
        return self.session.run(None, {self.session.get_inputs()[0].name: x})[0]

    def error(self) -> float:
        """Relative, over 64 rows of normal inputs."""
        x = np.random.default_rng(1).standard_normal((64, self.weight.shape[1]))
        wanted = x @ self.weight.double().numpy().T
        found = self.run(x.astype(np.float32))
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def of_layers(size: int, turns: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Figures of every way on one layer."""
    layers = {name: Layer(*way, size, folder) for name, way in WAYS.items()}
    found = {
        name: {"MiB": each.mib, "error": each.error(), "moved": each.moved}
        for name, each in layers.items()
    }
    for rows in (1, 128):
        x = np.random.default_rng(rows).standard_normal((rows, size)).astype(np.float32)
        works = {name: lambda each=each, x=x: each.run(x) for name, each in layers.items()}
        for name, ms in in_turns(works, turns).items():
            found[name][f"{rows} rows, ms"] = ms
    return found


def of_models(shape: str, turns: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Figures of every way on a language model."""
    found: dict[str, dict[str, Any]] = {}
    decoders, prefills = {}, {}
    for name, (scheme, level) in WAYS.items():
        at = make(
            folder / f"{shape}-{name}".replace(", ", "-").replace(" ", "-"),
            shape,
            scheme or "fp32",
            accuracy_level=level,
        )
        model, probe = open_model(at, THREADS), read_probe(at)
        outputs = OnnxPredictor(model).predict(probe.inputs)[probe.mask]
        wanted = probe.reference[probe.mask]
        size = sum(file.stat().st_size for file in at.glob("model.onnx*"))
        found[name] = {
            "MiB": size / 2**20,
            "error": float(np.linalg.norm(outputs - wanted) / np.linalg.norm(wanted)),
            "top1": float((outputs.argmax(-1) == wanted.argmax(-1)).mean()),
        }
        tokens = np.resize(probe.inputs["input_ids"][:1], (1, PROMPT))
        prefills[name] = lambda model=model, tokens=tokens: CausalDecoder(model).feed(tokens)
        decoders[name] = decoding(model, tokens)
    for name, ms in in_turns(prefills, max(2, turns // 3)).items():
        found[name]["prefill tokens/s"] = 1e3 * PROMPT / ms
    for name, ms in in_turns(decoders, turns).items():
        found[name]["decode tokens/s"] = 1e3 * STEPS / ms
    return found


def decoding(model: Any, tokens: Any) -> Callable[[], None]:
    """Some steps after a prompt that is fed once; the sequence grows."""
    decoder = CausalDecoder(model)
    decoder.feed(tokens)

    def steps() -> None:
        for _ in range(STEPS):
            decoder.feed(tokens[:, :1])

    return steps


def table(name: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown."""
    columns = list(dict.fromkeys(key for each in found.values() for key in each))
    lines = [f"| {name} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for way, each in found.items():
        cells = ("" if each.get(key) is None else _number(key, each[key]) for key in columns)
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _number(key: str, value: float) -> str:
    if key in ("error", "moved"):
        return f"{value:.1e}"
    return f"{value:.1%}" if key == "top1" else f"{value:.2f}" if "ms" in key else f"{value:.1f}"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=LLAMAS, default="llama-300m")
    parser.add_argument("--size", type=int, default=4096, help="inputs and outputs of the layer")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where models are made and kept")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        results["layer"] = of_layers(args.size, args.turns, Path(folder))
        print(table(f"{args.size} x {args.size}", results["layer"]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        results["model"] = of_models(args.shape, args.turns, args.folder or Path(folder))
        print(table(args.shape, results["model"]), flush=True)
    target = Path(__file__).parent / "output" / "nf4_onnx.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
