"""Do exported directories give the same outputs on CUDA as on the CPU, and how fast are they there?

    python benchmarks/onnx_models.py models vit-base:fp32 vit-base:int4 llama-300m:fp32 llama-300m:int4
    python benchmarks/cuda_parity.py models/*            # on a machine with a GPU and onnxruntime-gpu

Needs numpy, onnxruntime-gpu, and of qlx what is installed without extras and with `tokenizers`: neither torch
nor onnx. Each directory's own probe is run by both execution providers, through `qlx.runtime` as serving does.
`difference` is the largest |cuda - cpu| over the largest |cpu|, on real (not padding) positions, `relative` the
norm of the difference over the norm; both also against the probe's reference, which torch computed. `nodes` says
how many of the graph's nodes CUDA ran; the others fell to the CPU. Speed: the median of `--turns` calls, images/s
for classifiers and places, tokens/s for language models (prefill of 128 tokens; decoding after them, one
sequence and eight). Without a CUDA provider it says so and ends with exit code 4. `--self-test` compares the CPU with
itself, to see that the script runs. Figures go to benchmarks/output/cuda_parity.json.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from qlx.checkpoint import Probe, read_probe
from qlx.errors import MissingExtra
from qlx.runtime import CausalDecoder, Device, OnnxModel, OnnxPredictor, open_model
from qlx.runtime.devices import providers_of
from qlx.runtime.session import GRAPH_FILE

PROMPT, STEPS, ROWS, IMAGES = 128, 16, 8, (1, 32)
LIMIT = 1e-3
"""Largest relative distance of float32 sums in another order that is taken for the same model."""


def distances(found: Any, wanted: Any, mask: Any) -> dict[str, float]:
    """How far outputs are from others, where the mask is set, and how often the largest is the same."""
    if mask is not None:
        found, wanted = found[mask], wanted[mask]
    gap = np.abs(found - wanted)
    last = found.ndim - 1
    return {
        "difference": float(gap.max() / np.abs(wanted).max()),
        "relative": float(np.linalg.norm(gap) / np.linalg.norm(wanted)),
        "top1": float((found.argmax(last) == wanted.argmax(last)).mean()),
    }


def median_seconds(work: Callable[[], Any], turns: int) -> float:
    """Of one call, after two that do not count."""
    for _ in range(2):
        work()
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def image_speed(model: OnnxModel, probe: Probe, turns: int) -> dict[str, float]:
    """Images/s for each number of images at once."""
    predictor, one = OnnxPredictor(model), probe.inputs["pixel_values"][:1]
    found = {}
    for rows in IMAGES:
        pixels = {"pixel_values": np.repeat(one, rows, axis=0)}
        seconds = median_seconds(lambda pixels=pixels: predictor.predict(pixels), turns)
        found[f"images/s, {rows} at once"] = rows / seconds
    return found


def text_speed(model: OnnxModel, probe: Probe, turns: int) -> dict[str, float]:
    """Tokens/s of prefill and of decoding."""
    tokens = np.resize(probe.inputs["input_ids"][:1], (1, PROMPT))
    seconds = median_seconds(lambda: CausalDecoder(model).feed(tokens), turns)
    found = {f"prefill tokens/s, {PROMPT}": PROMPT / seconds}
    for rows in (1, ROWS):
        found[f"decode tokens/s, {rows} rows"] = rows / decode_seconds(model, tokens, rows, turns)
    return found


def decode_seconds(model: OnnxModel, tokens: Any, rows: int, turns: int) -> float:
    """Median time of a step after the prompt."""
    times = []
    for _ in range(1 + turns // 4):
        decoder = CausalDecoder(model, rows)
        decoder.feed(np.repeat(tokens, rows, axis=0))
        for _ in range(STEPS):
            start = time.perf_counter()
            decoder.feed(np.repeat(tokens[:, :1], rows, axis=0))
            times.append(time.perf_counter() - start)
    return statistics.median(times[STEPS:] or times)


def nodes_by_provider(directory: Path, probe: Probe, device: Device) -> dict[str, int]:
    """How many nodes each provider ran in one run, from onnxruntime's own profile."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.log_severity_level = 3
        session = ort.InferenceSession(directory / GRAPH_FILE, options, providers_of(device))
        session.run(None, first_step(session, probe))
        events = json.loads(Path(session.end_profiling()).read_text())
    ran = {e["name"]: e["args"]["provider"] for e in events if e.get("args", {}).get("provider")}
    return dict(Counter(ran.values()))


def first_step(session: Any, probe: Probe) -> dict[str, Any]:
    """Inputs of a run without a cache."""
    if "pixel_values" in probe.inputs:
        return {"pixel_values": probe.inputs["pixel_values"]}
    tokens = probe.inputs["input_ids"]
    rows, length = tokens.shape
    feeds = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.arange(length)[None].repeat(rows, 0),
    }
    for item in session.get_inputs():
        if item.name.startswith("past"):
            feeds[item.name] = np.zeros((rows, item.shape[1], 0, item.shape[3]), np.float32)
    return feeds


def measure(directory: Path, device: Device, turns: int) -> dict[str, Any]:
    """All figures of one directory."""
    probe = read_probe(directory)
    models = {"cpu": open_model(directory), device: open_model(directory, device=device)}
    outputs = {name: OnnxPredictor(model).predict(probe.inputs) for name, model in models.items()}
    speed = text_speed if probe.task == "causal-lm" else image_speed
    wanted = probe.reference if probe.own is None else probe.own
    return {
        "against the CPU": distances(outputs[device], outputs["cpu"], probe.mask),
        "against torch": distances(outputs[device], wanted, probe.mask),
        "nodes": nodes_by_provider(directory, probe, device),
        "speed": {name: speed(model, probe, turns) for name, model in models.items()},
    }


def lines(name: str, figures: dict[str, Any], device: str) -> list[str]:
    """What is printed of one directory."""
    told = [f"{name}: {', '.join(f'{n} nodes by {p}' for p, n in figures['nodes'].items())}"]
    told += [
        f"  {what}: " + ", ".join(f"{key} {value:.2e}" for key, value in figures[what].items())
        for what in ("against the CPU", "against torch")
    ]
    for what, rate in figures["speed"][device].items():
        cpu = figures["speed"]["cpu"][what]
        told.append(f"  {what}: {device} {rate:.1f}, cpu {cpu:.1f} (x {rate / cpu:.2f})")
    return told


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIRECTORY")
    parser.add_argument("--turns", type=int, default=20, help="calls whose median is taken")
    parser.add_argument("--self-test", action="store_true", help="the CPU against itself")
    args = parser.parse_args()
    device: Device = "cpu" if args.self_test else "cuda"
    print(
        f"onnxruntime {ort.__version__}, providers: {', '.join(ort.get_available_providers())}",
        flush=True,
    )
    results = {}
    for directory in args.directories:
        try:
            results[directory.name] = measure(directory, device, args.turns)
        except MissingExtra as error:
            print(f"no CUDA here: {error}")
            sys.exit(error.exit_code)
        print("\n".join(lines(directory.name, results[directory.name], device)), flush=True)
    target = Path(__file__).parent / "output" / "cuda_parity.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(results, indent=2) + "\n")
    far = [n for n, each in results.items() if each["against the CPU"]["relative"] > LIMIT]
    if far:
        print(f"FURTHER THAN {LIMIT:g} from the CPU: {', '.join(far)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
