"""What swappable adapters cost in onnxruntime: a swap, their inputs, and batches with several of them.

    python benchmarks/adapters_onnx.py                     # several minutes, 4 GB of disk, 8 GB of memory
    python benchmarks/adapters_onnx.py --quick             # a small model: seconds, to see that it runs

A ViT of 22 M parameters and a Llama of 0.3 B with random weights, in int4 (accuracy levels 0 and 4) and fp32, the
Llama with fused attention, and adapters of rank 16 on every linear layer, one of them of rank 8 on two. All graphs
run in one process, on one thread, in turns: the medians of each one's processor time, and of its quotient to the
plain graph's in the same turn, so that other work on the machine matters little. `bank` is the other way to mix a
batch: all adapters in one tensor per input, and a Gather by row inside the graph. Distances are those of each row to
the same row of its adapter alone. The tables go to standard output, everything to
benchmarks/output/adapters_onnx.json.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import nn

from qlx.checkpoint import QuantSpec
from qlx.exporting import build_graph, write_graph
from qlx.exporting.fused import can_fuse
from qlx.exporting.separate import make_swappable
from qlx.exporting.updates import Update, write_adapter_file
from qlx.quant import packed_linears, quantize_model
from qlx.runtime import session_options
from qlx.runtime.adapters import _stacked

PAST, PROMPT, ROWS, RANK = 128, 32, 4, 16
NAMES = ("one", "two", "small")
INT4 = QuantSpec(method="qlora", weight_bits=4, scheme="int4", group_size=64, backend="qlx")
PLACE = frozenset({"lora_A", "lora_B"})
PRECISIONS: dict[str, tuple[QuantSpec | None, int]] = {
    "int4": (INT4, 0),
    "int4 at level 4": (INT4, 4),
    "fp32": (None, 0),
}
"""What weights are stored in, and the accuracy level of their products."""
Feeds = dict[str, ort.OrtValue]


def llama(quick: bool) -> nn.Module:
    """0.3 B parameters, a sixth of them the embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = (256, 2, 512, 4) if quick else (1536, 10, 4096, 16)
    hidden, layers, inner, heads = sizes
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=heads // 2, vocab_size=32000, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def vit(quick: bool) -> nn.Module:
    """The shape of ViT-S/16."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    return ViTForImageClassification(
        ViTConfig(**sizes, num_hidden_layers=2 if quick else 12)
    ).eval()


MODELS = {"causal-lm": llama, "image-classification": vit}


def write_graphs(folder: Path, task: str, precision: str, quick: bool) -> dict[str, int]:
    """The plain graph, the swappable one and the bank in `folder`; the adapters' sizes in bytes."""
    quant, level = PRECISIONS[precision]
    for kind in ("plain", "swappable"):
        torch.manual_seed(0)
        model = MODELS[task](quick)
        if quant is not None:
            quantize_model(model, quant)
        layers = adapted_layers(model)
        prefixes = (
            make_swappable(model, dict.fromkeys(layers, PLACE)) if kind == "swappable" else {}
        )
        packed_linears(model, accuracy_level=level)
        (folder / kind).mkdir()
        swappable = kind == "swappable"
        fuse = can_fuse(model, task)
        graph = build_graph(model, task, prefixes=prefixes, swappable=swappable, fuse=fuse)
        write_graph(graph, folder / kind, task)
    write_bank(folder)
    for name in NAMES:
        write_adapter_file(folder / f"{name}.onnx_adapter", drawn(name, layers))
    return {name: (folder / f"{name}.onnx_adapter").stat().st_size for name in NAMES}


def adapted_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear layer inside the blocks."""
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and ".layers." in f".{name}"
    }


def drawn(name: str, layers: Mapping[str, tuple[int, int]]) -> dict[str, Update]:
    """An adapter whose effect shows; the small one has half the rank and two layers of each block."""
    small = name == "small"
    torch.manual_seed(NAMES.index(name))
    rank = RANK // 2 if small else RANK
    chosen = {
        n: sizes for n, sizes in layers.items() if not small or n.endswith(("q_proj", "v_proj"))
    }
    return {
        module: Update(torch.randn(inputs, rank) / inputs**0.5, torch.randn(rank, outputs) / 50)
        for module, (inputs, outputs) in chosen.items()
    }


def write_bank(folder: Path) -> None:
    """The swappable graph with a Gather of rows before each of its products."""
    model = ir.load(folder / "swappable" / "model.onnx")
    graph = model.graph
    rows = ir.Value(
        name="adapter_ids", shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT64)
    )
    for value in [v for v in graph.inputs if ".lora_" in (v.name or "")]:
        ((node, place),) = value.uses()
        gather = ir.node("Gather", [value, rows], {"axis": 0})
        graph.insert_before(node, gather)
        node.replace_input_with(place, gather.outputs[0])
    graph.inputs.append(rows)
    (folder / "bank").mkdir()
    ir.save(model, folder / "bank" / "model.onnx", external_data="model.onnx.data")


def opened(directory: Path) -> ort.InferenceSession:
    """A session over a directory's graph."""
    return ort.InferenceSession(directory / "model.onnx", session_options(1))


def value(array: Any) -> ort.OrtValue:
    """An array as onnxruntime takes it without copying."""
    return ort.OrtValue.ortvalue_from_numpy(array)


def text_feeds(session: ort.InferenceSession, rows: int, past: int, fresh: int) -> Feeds:
    """A step of `fresh` tokens over a filled cache."""
    random = np.random.default_rng(0)
    feeds = {
        "input_ids": value(random.integers(0, 32000, (rows, fresh))),
        "attention_mask": value(np.ones((rows, past + fresh), np.int64)),
        "position_ids": value(np.arange(past, past + fresh)[None].repeat(rows, 0)),
    }
    for item in session.get_inputs():
        if item.name.startswith("past"):
            shape = (rows, item.shape[1], past, item.shape[3])
            feeds[item.name] = value(random.standard_normal(shape).astype(np.float32))
    return feeds


def image_feeds(rows: int) -> Feeds:
    """Images of noise."""
    pixels = np.random.default_rng(0).standard_normal((rows, 3, 224, 224))
    return {"pixel_values": value(pixels.astype(np.float32))}


def seconds(work: Callable[[], Any]) -> float:
    """How much time of this thread it takes."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def in_turns(works: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each, and of its quotient to the first in the same turn; each begins some turns."""
    for work in works.values():
        work()
    order, first = list(works), next(iter(works))
    times = []
    for turn in range(turns):
        shifted = order[turn % len(order) :] + order[: turn % len(order)]
        times.append({name: seconds(works[name]) for name in shifted})
    return {
        name: {
            "ms": 1e3 * statistics.median(turn[name] for turn in times),
            "times": statistics.median(turn[name] / turn[first] for turn in times),
        }
        for name in works
    }


class Subject:
    """The graphs of one model and its adapters, ready to run."""

    def __init__(self, folder: Path, task: str) -> None:
        self.sessions = {kind: opened(folder / kind) for kind in ("plain", "swappable", "bank")}
        self.files = {name: folder / f"{name}.onnx_adapter" for name in NAMES}
        self.adapters: dict[str | None, Feeds] = {
            name: ort.AdapterFormat.read_adapter(str(file)).get_parameters()
            for name, file in self.files.items()
        }
        self.adapters[None] = {}
        self.bank = self._bank()
        self.outputs = [item.name for item in self.sessions["plain"].get_outputs()]

    def _bank(self) -> Feeds:
        """All adapters stacked, the base first."""
        return _stacked([self.adapters[name] for name in (None, *NAMES)])

    def run(self, kind: str, feeds: Feeds, more: Feeds | None = None) -> Any:
        """The logits."""
        found = self.sessions[kind].run_with_ort_values(self.outputs, {**feeds, **(more or {})})
        return found[0].numpy()

    def works(self, feeds: Feeds, rows: int) -> dict[str, Callable[[], Any]]:
        """Everything that can be done with a batch, the plain graph first."""
        found: dict[str, Callable[[], Any]] = {
            "plain graph": lambda: self.run("plain", feeds),
            "no adapter": lambda: self.run("swappable", feeds),
            "one adapter": lambda: self.run("swappable", feeds, self.adapters["one"]),
        }
        if rows > 1:
            names, mixed = self.mixed(rows)
            ids = value(np.array([(None, *NAMES).index(name) for name in names]))
            bank = {**self.bank, "adapter_ids": ids}
            found["mixed rows"] = lambda: self.run("swappable", feeds, mixed)
            found["mixed, bank"] = lambda: self.run("bank", feeds, bank)
        return found

    def mixed(self, rows: int) -> tuple[list[str | None], Feeds]:
        """The base and all adapters in turn, by row, and their stacked inputs."""
        names = [(None, *NAMES)[row % (1 + len(NAMES))] for row in range(rows)]
        return names, _stacked([self.adapters[name] for name in names])

    def mixed_distance(self, feeds: Feeds, rows: int) -> float:
        """Largest relative distance of a row in a mixed batch from the row of its adapter alone."""
        names, mixed = self.mixed(rows)
        together = self.run("swappable", feeds, mixed)
        far = 0.0
        for row, name in enumerate(names):
            alone = self.run("swappable", feeds, self.adapters[name])[row]
            far = max(far, float(np.linalg.norm(together[row] - alone) / np.linalg.norm(alone)))
        return far

    def swaps(self, turns: int) -> dict[str, float]:
        """Median milliseconds to read an adapter from its file, and to stack several for a batch."""
        read = [
            seconds(lambda: ort.AdapterFormat.read_adapter(str(self.files["one"])).get_parameters())
            for _ in range(turns)
        ]
        stack = [seconds(lambda: self.mixed(ROWS)) for _ in range(turns)]
        chosen = [seconds(lambda: {**self.adapters["one"]}) for _ in range(turns)]
        named = {"choose": chosen, "read": read, "stack": stack}
        return {name: 1e3 * statistics.median(times) for name, times in named.items()}


def measure(folder: Path, task: str, precision: str, args: argparse.Namespace) -> Any:
    """All figures of one model in one precision."""
    sizes = write_graphs(folder, task, precision, args.quick)
    subject = Subject(folder, task)
    plain = subject.sessions["plain"]
    if task == "causal-lm":
        steps: dict[str, tuple[int, Feeds]] = {
            "decode, 1 row": (1, text_feeds(plain, 1, PAST, 1)),
            f"decode, {ROWS} rows": (ROWS, text_feeds(plain, ROWS, PAST, 1)),
            f"prefill {PROMPT}, 1 row": (1, text_feeds(plain, 1, 0, PROMPT)),
            f"prefill {PROMPT}, {ROWS} rows": (ROWS, text_feeds(plain, ROWS, 0, PROMPT)),
        }
    else:
        steps = {"1 image": (1, image_feeds(1)), f"{ROWS} images": (ROWS, image_feeds(ROWS))}
    found = {
        name: in_turns(subject.works(feeds, rows), args.turns)
        for name, (rows, feeds) in steps.items()
    }
    rows, feeds = list(steps.values())[1]
    exact = bool((subject.run("plain", feeds) == subject.run("swappable", feeds)).all())
    return {
        "steps": found,
        "swaps_ms": subject.swaps(args.turns),
        "adapter_bytes": sizes,
        "none_is_the_base_to_the_bit": exact,
        "mixed_distance": subject.mixed_distance(feeds, rows),
    }


def table(name: str, figures: Mapping[str, Any]) -> Sequence[str]:
    """Lines of Markdown."""
    columns = ("plain graph", "no adapter", "one adapter", "mixed rows", "mixed, bank")
    lines = [f"| {name} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for step, works in figures["steps"].items():
        cells = [
            f"{works[c]['ms']:.2f} ms (× {works[c]['times']:.3f})" if c in works else ""
            for c in columns
        ]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    swaps = ", ".join(f"{what} {ms:.3f} ms" for what, ms in figures["swaps_ms"].items())
    exact = "the same bits" if figures["none_is_the_base_to_the_bit"] else "OTHER BITS"
    return [*lines, "", f"{swaps}; adapter {figures['adapter_bytes']['one'] / 2**20:.1f} MiB; without adapter "
            f"{exact} as the plain graph; mixed rows {figures['mixed_distance']:.1e} from each alone", ""]  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--turns", type=int, default=9, help="how often each is run")
    parser.add_argument("--only", metavar="NAME", help="one of them, such as 'ViT-S, fp32'")
    args = parser.parse_args()
    results: dict[str, Any] = {}
    for task, named in (("image-classification", "ViT-S"), ("causal-lm", "Llama 0.3 B")):
        for precision in PRECISIONS:
            name = f"{named}, {precision}"
            if args.only not in (None, name):
                continue
            with tempfile.TemporaryDirectory() as folder:
                results[name] = measure(Path(folder), task, precision, args)
            print("\n".join(table(name, results[name])), flush=True)
    target = Path(__file__).parent / "output" / "adapters_onnx.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
