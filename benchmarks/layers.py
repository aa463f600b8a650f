"""One frozen linear layer of each kind: forward, and the gradient of its inputs, in fp32.

    python benchmarks/layers.py                   # half a minute
    python benchmarks/layers.py --width 2048 --rows 1024

Kinds take turns; a time is the lowest of `--turns`. `bitsandbytes` is its own `Linear4bit` with the same codes.
The table goes to standard output, everything to benchmarks/output/layers.json.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlx.checkpoint import QuantSpec
from qlx.quant import packed_layer, packed_of_module, quantize_tensor

SCHEMES: dict[str, dict[str, Any]] = {
    "nf4, double": {"scheme": "nf4", "group_size": 64, "double_quant": True},
    "nf4": {"scheme": "nf4", "group_size": 64, "double_quant": False},
    "int8": {"scheme": "int8"},
    "int4": {"scheme": "int4", "group_size": 64},
    "int4, zeros": {"scheme": "int4", "group_size": 64, "symmetric": False},
    "ternary": {"scheme": "ternary", "group_size": 64},
}


def main() -> int:
    """Make the layers, time them in turns, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=1024, help="tokens of a batch")
    parser.add_argument("--turns", type=int, default=20)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    layers = make_layers(torch.randn(arguments.width, arguments.width) * 0.03)
    x = torch.randn(arguments.rows, arguments.width, requires_grad=True)
    found = measure(layers, x, arguments.turns)
    output = Path(__file__).parent / "output"
    output.mkdir(exist_ok=True)
    (output / "layers.json").write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))
    return 0


def make_layers(weight: Tensor) -> dict[str, nn.Module]:
    """The weight as a frozen `nn.Linear`, packed in each scheme, and in bitsandbytes' own layer."""
    plain = nn.Linear(*weight.shape[::-1], bias=False)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    layers: dict[str, nn.Module] = {"float32": plain, "bitsandbytes, nf4, double": stock(weight)}
    for name, fields in SCHEMES.items():
        packed = quantize_tensor(weight, QuantSpec(method="qlora", **fields))
        layers[name] = packed_layer(packed, None, torch.float32, None)
    return layers


def stock(weight: Tensor) -> nn.Module:
    """The weight in bitsandbytes' own layer, in training mode, where it does not change its codes."""
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        *weight.shape[::-1], bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    layer.load_state_dict({"weight": weight})
    layer.weight.requires_grad = False
    return layer.to("cpu").train()


def measure(layers: dict[str, nn.Module], x: Tensor, turns: int) -> dict[str, dict[str, float]]:
    """Lowest seconds of forward and backward, and the bytes of the weight, by layer."""
    found = {
        name: {"seconds": float("inf"), "bytes": weigh(layer)} for name, layer in layers.items()
    }
    gradient = torch.randn_like(x)
    for _ in range(turns):
        for name, layer in layers.items():
            taken = clock(lambda layer=layer: layer(x).backward(gradient))
            found[name]["seconds"] = min(found[name]["seconds"], taken)
            x.grad = None
    return found


def clock(act: Callable[[], None]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def weigh(layer: Any) -> float:
    """Bytes of a layer's weight, its scales included."""
    plain = type(layer) is nn.Linear
    return float(layer.weight.nbytes if plain else packed_of_module(layer).nbytes)


def table(found: dict[str, dict[str, float]]) -> str:
    """Milliseconds, beside the layer of floats, and bytes a weight, as Markdown."""
    base = found["float32"]
    lines = ["| weight | ms | of float32's | bytes of float32's |", "|---|---|---|---|"]
    for name, row in found.items():
        lines.append(
            f"| {name} | {row['seconds'] * 1e3:.1f} | {row['seconds'] / base['seconds']:.2f} | "
            f"{row['bytes'] / base['bytes']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
