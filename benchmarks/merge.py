"""Merging a LoRA adapter: qlx beside PEFT's load + merge + save and beside `cp`, in one run.

    python benchmarks/merge.py                    # a 1.7 GB Llama in bf16, about a minute
    python benchmarks/merge.py --size 8B --only qlx,cp --repeats 1      # 16 GB: memory stays flat

Every measurement is a process of its own, after its imports; the methods take turns in changing order, and
the table gives medians. Before each, the base is copied and the copy removed: a virtual machine gives free
memory back to its host, and getting it again would be counted for whoever comes next. `wall` depends on
what else the machine does, `cpu` (seconds of all threads) does less.
Of qlx, *work* is all of the plan, the hashing of base and result, and the writing: `qlx` with a base whose
hashes an earlier command has left (the usual case: training read it), `qlx first` with one never
seen. *sync* flushes the result to the disk, which cp and PEFT leave to the system (so `cp` has a row with
it); *copy* and *hash* are the two things no merge can leave out, alone and on all cores: a copy in the
kernel, one thread a file, and SHA-256 of every byte; *proof* runs the merged model on its probe, layer by
layer. The table goes to standard output, everything to benchmarks/output/merge.json.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, int]] = {
    "0.2B": {"layers": 12, "hidden": 1024, "intermediate": 2816, "heads": 16, "kv_heads": 4, "vocabulary": 16000},
    "0.9B": {},
    "8B": {"layers": 32, "hidden": 4096, "intermediate": 14336, "vocabulary": 128256, "shards": 4},
}  # fmt: skip

_COMMON = """
import json, os, shutil, subprocess, sys, time
from pathlib import Path

def mark(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def settle():
    # as much memory as the output needs is free and at hand, whatever ran before
    scratch = str(output) + ".scratch"
    subprocess.run(["cp", "-r", str(base), scratch], check=True)
    shutil.rmtree(scratch)

class Stage:
    def __enter__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self
    def __exit__(self, *error):
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu

def say(held, **stages):
    times = {name: {"wall": stage.wall, "cpu": stage.cpu} for name, stage in stages.items()}
    print(json.dumps({"stages": times, "held": held, "peak": mark("VmHWM")}))

base, adapter, output = map(Path, sys.argv[1:4])
"""

QLX = (
    _COMMON
    + """
import torch
from qlx.checkpoint import open_checkpoint, resolve_source
from qlx.checkpoint.durable import sync_tree
from qlx.merging import check_effect, plan_of, write_merge
settle()
held = mark("VmRSS")
with Stage() as work:
    opened = open_checkpoint(adapter)
    plan = plan_of(opened, resolve_source(str(base)), None, None, True, check_codes=False)
    output.mkdir()
    written = write_merge(plan, output)
    assert written.fingerprint == opened.manifest.base.fingerprint
    assert written.codes == opened.manifest.quantization.fingerprint
    check_effect(written.roundings, 0.5, "bfloat16")
peak = mark("VmHWM")
with Stage() as sync:
    sync_tree(output)
times = {name: {"wall": s.wall, "cpu": s.cpu} for name, s in (("work", work), ("sync", sync))}
if "proof" in sys.argv:
    from qlx.checkpoint import read_probe
    from qlx.models import TorchPredictor, streamed_model
    shutil.copy(adapter / "config.json", output)
    probe = read_probe(adapter)
    import transformers
    with Stage() as proof:
        TorchPredictor(streamed_model(output, "causal-lm"), "causal-lm").predict(probe.inputs)
    times["proof"] = {"wall": proof.wall, "cpu": proof.cpu}
print(json.dumps({"stages": times, "held": held, "peak": peak, "proof_peak": mark("VmHWM")}))
"""
)

PEFT = (
    _COMMON
    + """
import torch, transformers, peft
from transformers import AutoModelForCausalLM
settle()
held = mark("VmRSS")
with Stage() as work:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    model.save_pretrained(output)
say(held, work=work)
"""
)

FLOOR = (
    _COMMON
    + """
import hashlib
from concurrent.futures import ThreadPoolExecutor
def copied(path):
    with open(path, "rb") as source, open(output / path.name, "wb") as target:
        left = path.stat().st_size
        while left:
            left -= os.copy_file_range(source.fileno(), target.fileno(), min(left, 2**24))
def hashed(span):
    path, at, end = span
    sha256, buffer = hashlib.sha256(), memoryview(bytearray(2**18))
    with open(path, "rb", buffering=0) as file:
        while at < end:
            count = os.preadv(file.fileno(), [buffer[: end - at]], at)
            sha256.update(buffer[:count])
            at += count
files = sorted(base.glob("*.safetensors"))
spans = [(path, at, min(at + 2**25, path.stat().st_size))
         for path in files for at in range(0, path.stat().st_size, 2**25)]
settle()
held = mark("VmRSS")
output.mkdir()
with Stage() as work, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
    list(pool.map(copied, files) if "copy" in sys.argv else pool.map(hashed, spans))
say(held, work=work)
"""
)


def main() -> int:
    """Generate, measure, print."""
    arguments = _arguments()
    if arguments.nf4:
        arguments.targets = "linear"
    root = Path(tempfile.mkdtemp(prefix="qlx-merge-", dir=arguments.directory))
    try:
        made = _generated(root, arguments)
        runs = _measured(root, made, arguments)
    finally:
        shutil.rmtree(root)
    result = {"size": arguments.size, "targets": arguments.targets, "nf4": arguments.nf4,
              "cores": len(os.sched_getaffinity(0)), **made["facts"], "runs": runs}  # fmt: skip
    output = Path(__file__).parent / "output"
    output.mkdir(exist_ok=True)
    name = f"merge-{arguments.size}-{arguments.targets}{'-nf4' if arguments.nf4 else ''}.json"
    (output / name).write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="0.9B")
    parser.add_argument("--targets", choices=["attention", "linear"], default="attention")
    parser.add_argument(
        "--nf4", action="store_true", help="trained on NF4 with double quantization"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--only",
        default="cp,cp+sync,copy,hash,qlx,qlx first,peft",
        help="methods, separated by commas",
    )
    parser.add_argument("--proof", action="store_true", help="measure the replay by layers too")
    parser.add_argument("--directory", help="where the model is generated (default: TMPDIR)")
    return parser.parse_args()


def _generated(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from generated import ATTENTION, LINEAR, Size, make_adapter, make_model, nf4_spec

    size = Size(**SIZES[arguments.size])
    free, needed = shutil.disk_usage(root).free, 4 * sum(_count(s) for s in size.shapes().values())
    if free < needed:
        raise SystemExit(f"{root}: {needed} bytes needed, {free} free")
    leaves = LINEAR if arguments.targets == "linear" else ATTENTION
    base = make_model(root / "base", size)
    spec = nf4_spec(base, size) if arguments.nf4 else None
    adapter = make_adapter(root / "adapter", base, size, leaves, spec)
    counts = [_count(shape) for shape in size.shapes().values()]
    facts = {"bytes": 2 * sum(counts), "largest_tensor": 2 * max(counts),
             "adapter_bytes": (adapter / "adapter_model.safetensors").stat().st_size}  # fmt: skip
    return {"base": base, "adapter": adapter, "facts": facts}


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _measured(
    root: Path, made: dict[str, Any], arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    runs = []
    methods = arguments.only.split(",")
    if "qlx" in methods:
        _remember(made["base"], root / "cache")
    for at in range(arguments.repeats):
        for method in methods[at % len(methods) :] + methods[: at % len(methods)]:
            output = root / "output"
            _warm(made["base"])
            started = os.getloadavg()[0]
            extra = ["proof"] if arguments.proof and at == 0 else []
            found = _run(method, made, output, extra)
            runs.append({"method": method, "load": started, **found})
            print(f"  {method}: {_short(found)} (load {started:.1f})", file=sys.stderr)
            shutil.rmtree(output)
            os.sync()
    return runs


def _remember(base: Path, cache: Path) -> None:
    """Let the hashes of the base be kept, as any command that reads it does once it is old enough."""
    from qlx.checkpoint import fingerprint_directory
    from qlx.checkpoint.known import SETTLED_SECONDS, Stamp

    os.environ["QLX_CACHE"] = str(cache)
    while not all(Stamp.of(path).settled for path in base.glob("*.safetensors")):
        print(f"  waiting until the base is {SETTLED_SECONDS:.0f} s old", file=sys.stderr)
        time.sleep(10)
    fingerprint_directory(base)


def _warm(base: Path) -> None:
    """Read a base that fits in the page cache, so that every method finds it there."""
    if sum(path.stat().st_size for path in base.iterdir()) < 4e9:
        for path in base.iterdir():
            path.read_bytes()


def _short(found: dict[str, Any]) -> str:
    return ", ".join(
        f"{n} {s['wall']:.2f} s ({s['cpu']:.2f} cpu)" for n, s in found["stages"].items()
    )


def _run(method: str, made: dict[str, Any], output: Path, extra: list[str]) -> dict[str, Any]:
    if method.startswith("cp"):
        return _copy(made["base"], output, sync=method == "cp+sync")
    code = {"peft": PEFT, "copy": FLOOR, "hash": FLOOR}.get(method, QLX)
    extra = [method] if code is FLOOR else extra
    command = [sys.executable, "-c", code, str(made["base"]), str(made["adapter"]), str(output)]
    root = str(Path(__file__).parents[1])
    cache = "off" if method == "qlx first" else str(output.parent / "cache")
    environment = {**os.environ, "QLX_CACHE": cache}
    done = subprocess.run(
        [*command, *extra], capture_output=True, text=True, cwd=root, check=False, env=environment
    )
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _copy(base: Path, output: Path, *, sync: bool) -> dict[str, Any]:
    shutil.copytree(base, f"{output}.scratch")
    shutil.rmtree(f"{output}.scratch")
    start = time.perf_counter()
    child = os.posix_spawnp("cp", ["cp", "-r", str(base), str(output)], os.environ)
    usage = os.wait4(child, 0)[2]
    if sync:
        for path in output.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    wall = time.perf_counter() - start
    return {"stages": {"work": {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime}}}


def table(result: dict[str, Any]) -> str:
    """Medians by method as Markdown, with ratios and peak memory."""
    cells = {
        m: _median(result["runs"], m) for m in dict.fromkeys(r["method"] for r in result["runs"])
    }
    lines = [
        f"{result['size']} Llama, {result['bytes'] / 1e9:.2f} GB in bf16, {result['targets']}"
        f"{', NF4 as trained' if result['nf4'] else ''}, {result['cores']} cores",
        "",
        "| | wall s | × cp | cpu s | peak MiB above imports |",
        "|---|---|---|---|---|",
    ]
    copied = cells.get("cp", {}).get("wall")
    for method, cell in cells.items():
        ratio = f"{cell['wall'] / copied:.2f}" if copied else ""
        peak = f"{cell['memory'] / 2**20:.0f}" if "memory" in cell else ""
        lines.append(f"| {method} | {cell['wall']:.2f} | {ratio} | {cell['cpu']:.2f} | {peak} |")
        if "durable" in cell:
            lines.append(f"| {method} + sync | {cell['durable']:.2f} | | | |")
        if "proof" in cell:
            times = f"{cell['proof']:.2f} | | {cell['proof_cpu']:.2f}"
            memory = f"{cell['proof_memory'] / 2**20:.0f}"
            lines.append(f"| {method}, replay by layers | {times} | {memory} |")
    bound = 2 * result["largest_tensor"] + 64 * 2**20
    lines += [
        "",
        f"bound on memory: {bound / 2**20:.0f} MiB; adapter {result['adapter_bytes'] / 2**20:.0f} MiB",
    ]
    for method in sorted({"qlx", "qlx first"} & cells.keys() if "peft" in cells else ()):
        lines.append(f"PEFT / {method}: {cells['peft']['wall'] / cells[method]['wall']:.1f} × wall, "
                     f"{cells['peft']['cpu'] / cells[method]['cpu']:.1f} × cpu")  # fmt: skip
    return "\n".join(lines)


def _median(runs: list[dict[str, Any]], method: str) -> dict[str, float]:
    chosen = [run for run in runs if run["method"] == method]
    work = [run["stages"]["work"] for run in chosen]
    cell = {key: statistics.median(stage[key] for stage in work) for key in ("wall", "cpu")}
    if "peak" in chosen[0]:
        cell["memory"] = max(run["peak"] - run["held"] for run in chosen)
    if "sync" in chosen[0]["stages"]:
        cell["durable"] = statistics.median(
            run["stages"]["work"]["wall"] + run["stages"]["sync"]["wall"] for run in chosen
        )
    for run in chosen:
        if "proof" in run["stages"]:
            proof = run["stages"]["proof"]
            cell |= {"proof": proof["wall"], "proof_cpu": proof["cpu"],
                     "proof_memory": run["proof_peak"] - run["held"]}  # fmt: skip
    return cell


if __name__ == "__main__":
    sys.exit(main())
