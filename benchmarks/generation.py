"""Tokens per second of language models: qlx's directories against llama.cpp and onnxruntime-genai's own build.

    make peers                                             # llama-cpp-python, compiled for this machine
    python benchmarks/generation.py --llama-python .venv-peers/bin/python         # about ten minutes, 4 GB of disk
    python benchmarks/generation.py --only ternary,TQ2_0 --turns 15              # contenders by how their names begin
    python benchmarks/generation.py --quick                # a small shape: to see that it runs
    python benchmarks/generation.py --tiny quickstart-output/language/python-base  # a trained model, too
    python benchmarks/generation.py --vocabulary 32000     # where the head weighs: with it in 8 bits, and as it is

A Llama of 0.3 B parameters with random weights, and whatever `--tiny` names, packed to int4, ternary and int8 by
`qlx pack` in groups of 128, exported by `qlx export-onnx --accuracy-level 4`, and written as GGUF by `pack --to gguf`;
int4 and ternary once more with `--head int8`, beside GGUF whose head is of llama.cpp's 8 bits.
Each figure is from a process of its own with two threads: 128 tokens at once (prefill, the first answer token with
it), then 62 tokens one by one (decode), greedy, best of five repeats; contenders and the memory's bandwidth take
turns, and the medians of the turns are shown. `MB` is what decoding a token has to read: the weights without the
embedding's table. The tables go to standard output, everything to benchmarks/output/generation.json.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

THREADS, PROMPT, STEPS, REPEATS, GROUP = 2, 128, 62, 5, 128
TOKENS = [5 + at % 100 for at in range(PROMPT)]
PACKED = {"int4": "Q4_0", "ternary": "TQ2_0", "int8": "Q8_0"}
"""What qlx packs to, and llama.cpp's type of equal bits."""

HEADS = ("int4", "ternary")
"""Which of them are made with an 8-bit head, too."""

SMALL = "qlx.runtime with pages of 4 kB"
Sample = dict[str, float]
Case = tuple[str, str, Path]
"""Label, engine, and the directory or file that it runs."""


# What each process runs


def timed(prefill: Callable[[], Any], step: Callable[[], Any]) -> Sample:
    """Tokens per second of the best repeat."""
    found: dict[str, list[float]] = {"prefill": [], "decode": []}
    for _ in range(REPEATS):
        start = time.perf_counter()
        prefill()
        middle = time.perf_counter()
        for _ in range(STEPS):
            step()
        found["prefill"].append(PROMPT / (middle - start))
        found["decode"].append(STEPS / (time.perf_counter() - middle))
    return {name: max(values) for name, values in found.items()}


def run_small_pages(path: str) -> Sample:
    """`qlx.runtime` with its weights left in pages of 4 kB."""
    from qlx.runtime import pages

    pages._collapse = lambda blocks: None
    return run_qlx(path)


def run_qlx(path: str) -> Sample:
    """`qlx.runtime`, the arg max of its logits; how many seconds opening took, and MiB in memory then."""
    from qlx.runtime import CausalDecoder, open_model

    start = time.perf_counter()
    model = open_model(path, THREADS)
    opened = {"open": time.perf_counter() - start, "resident": resident()}
    state: dict[str, Any] = {}

    def prefill() -> None:
        state["decoder"] = CausalDecoder(model)
        state["token"] = state["decoder"].feed(np.array([TOKENS]))[0, -1].argmax()

    def step() -> None:
        state["token"] = state["decoder"].feed(np.array([[state["token"]]]))[0, -1].argmax()

    return timed(prefill, step) | opened


def resident() -> float:
    """MiB of this process that lie in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def run_genai(path: str) -> Sample:
    """onnxruntime-genai's generator; qlx need not be installed for it."""
    import onnxruntime_genai as og

    config = og.Config(path)
    options = {"session_options": {"intra_op_num_threads": THREADS}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    model, state = og.Model(config), {}

    def prefill() -> None:
        parameters = og.GeneratorParams(model)
        length = PROMPT + STEPS + 2
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        state["generator"] = og.Generator(model, parameters)
        state["generator"].append_tokens([TOKENS])
        state["generator"].generate_next_token()

    return timed(prefill, lambda: state["generator"].generate_next_token())


def run_llama_cpp(path: str) -> Sample:
    """llama.cpp's evaluation through llama-cpp-python, the next token given."""
    from llama_cpp import Llama

    model = Llama(
        path, n_ctx=256, n_threads=THREADS, n_threads_batch=THREADS, verbose=False, logits_all=False
    )

    def prefill() -> None:
        model.reset()
        model.eval(TOKENS)

    return timed(prefill, lambda: model.eval([7]))


def profile(path: str) -> Sample:
    """Where a token's decoding goes, in ms by operator; profiling itself costs some µs at every node."""
    import onnxruntime as ort

    from qlx.runtime import CausalDecoder, open_model, session

    plain = session.session_options

    def watched(threads: int | None = None) -> ort.SessionOptions:
        options = plain(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(tempfile.mkdtemp()) / "profile")
        return options

    session.session_options = watched
    model = open_model(path, THREADS)
    decoder = CausalDecoder(model)
    decoder.feed(np.array([TOKENS]))
    for _ in range(STEPS):
        decoder.feed(np.array([[7]]))
    events = json.loads(Path(model.session.end_profiling()).read_text())
    first = [each for each in events if each["name"] == "model_run"][1]["ts"]
    found: dict[str, list[float]] = {}
    for each in events:
        if each.get("cat") == "Node" and each["ts"] > first and "input_type_shape" in each["args"]:
            found.setdefault(_kind(each["args"]), []).append(each["dur"])
    return {kind: sum(spent) / 1e3 / (STEPS - 1) for kind, spent in found.items()}


def _kind(facts: dict[str, Any]) -> str:
    """The operator, and of products of packed integers the width of what they give and take."""
    if facts["op_name"] != "MatMulNBits":
        return str(facts["op_name"])
    sizes = [next(iter(each.values())) for each in facts["input_type_shape"]]
    return f"MatMulNBits, {sizes[0][-1]} to {sizes[-1][0]}"


ENGINES = {
    "profile": profile,
    "qlx": run_qlx,
    "small pages": run_small_pages,
    "genai": run_genai,
    "llama.cpp": run_llama_cpp,
}


# The models


def random_llama(target: Path, quick: bool, vocabulary: int) -> None:
    """A merged checkpoint with a byte-pair tokenizer of at most 4096 tokens, trained on this repository's documents."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from qlx.checkpoint import (
        Manifest,
        ProbeRecord,
        new_checkpoint,
        next_step,
        seal,
        write_probe,
    )
    from qlx.inputs import train_tokenizer
    from qlx.models import make_probe

    hidden, layers, heads, inner = (256, 2, 4, 512) if quick else (1024, 24, 16, 3072)
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=4,
        intermediate_size=inner, vocab_size=vocabulary, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for layer in (
        model.model.layers
    ):  # what a layer adds is small, as in a trained model: rounding does not grow
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            part.weight.data *= 0.2
    texts = [each.read_text() for each in Path(__file__).parents[1].rglob("docs/*.md")]
    inputs = {"input_ids": np.array([TOKENS[:24]] * 2), "attention_mask": np.ones((2, 24), int)}
    inputs["attention_mask"][1, 18:] = 0
    with new_checkpoint(target) as staging:
        model.save_pretrained(staging)
        for name, data in train_tokenizer(texts, 4096).items():
            (staging / name).write_bytes(data)
        probe = make_probe(model, "causal-lm", inputs, None, False)
        write_probe(staging / "probe.safetensors", probe)
        step = next_step("merge", parents=(), options={"exact": True})
        record = ProbeRecord(reference="the random model")
        seal(
            staging,
            Manifest(kind="merged", task="causal-lm", tag="random", lineage=(step,), probe=record),
        )


def cases_of(name: str, merged: Path, room: Path, llama: bool) -> list[Case]:
    """Everything made of one merged checkpoint; what lies in `room` already is used again."""
    made: list[Case] = []
    for to, kind in PACKED.items():
        packed, onnx = room / f"{name}-{to}", room / f"{name}-{to}-onnx"
        packed_of(merged, packed, to=to, group_size=GROUP)
        exported(packed, onnx)
        made += [(f"{to}, qlx.runtime", "qlx", onnx), (f"{to}, genai", "genai", onnx)]
        made.append((f"{to}, {SMALL}", "small pages", onnx))
        if llama and (file := gguf_of(merged, room / f"{name}-{kind}", kind)):
            made.append((f"{kind}, llama.cpp", "llama.cpp", file))
        if to in HEADS:
            exported(packed, room / f"{name}-{to}-head", head="int8")
            made.append((f"{to} and head int8, qlx.runtime", "qlx", room / f"{name}-{to}-head"))
            with eight_bit_heads():
                file = gguf_of(merged, room / f"{name}-{kind}-head", kind) if llama else None
            made += [(f"{kind} and head Q8_0, llama.cpp", "llama.cpp", file)] if file else []
    generic = room / f"{name}-int4-generic"
    exported(room / f"{name}-int4", generic, fuse=False)
    made.append(("int4, generic attention, qlx.runtime", "qlx", generic))
    built = room / f"{name}-built"
    if not built.exists():
        build(merged, built)
    made.append(("genai's own int4, groups of 32", "genai", built))
    return made


def gguf_of(merged: Path, target: Path, kind: str) -> Path | None:
    """The file of a type of llama.cpp's, if the model's layers are wide enough for its blocks."""
    from qlx.errors import Unsupported

    try:
        packed_of(merged, target, to="gguf", gguf_type=kind)
    except Unsupported as error:
        print(f"no {kind}: {error}", file=sys.stderr)
        return None
    return target / "model.gguf"


@contextlib.contextmanager
def eight_bit_heads() -> Iterator[None]:
    """Let GGUF files have heads of Q8_0 meanwhile, where `qlx pack` writes 16 bits."""
    from qlx.packing import gguf

    known = gguf._types

    def types(*given: Any) -> dict[str, str]:
        found = known(*given)
        return found | {name: "Q8_0" for name in found if name == "lm_head.weight"}

    gguf._types = types
    try:
        yield
    finally:
        gguf._types = known


def packed_of(merged: Path, target: Path, **options: Any) -> None:
    """`qlx pack`, whatever is left of the (untrained) model."""
    from qlx.packing import pack

    if not target.exists():
        pack(merged, target, min_retention=0, **options)


def exported(packed: Path, target: Path, *, fuse: bool = True, head: str | None = None) -> None:
    """`qlx export-onnx --accuracy-level 4`."""
    from qlx.exporting import export, export_onnx

    if target.exists():
        return
    known = export.can_fuse
    try:
        if not fuse:
            export.can_fuse = lambda model, task: False
        export_onnx(packed, target, accuracy_level=4, head=head)
    finally:
        export.can_fuse = known


def build(merged: Path, target: Path) -> None:
    """The builder's int4 of the plain files, head and all, at the same accuracy level."""
    with tempfile.TemporaryDirectory() as plain:
        for file in merged.iterdir():
            if not file.name.startswith(("qlx", "probe")):
                (Path(plain) / file.name).symlink_to(file.resolve())
        command = [
            sys.executable,
            "-m",
            "onnxruntime_genai.models.builder",
            "-i",
            plain,
            "-o",
            str(target),
        ]
        extra = ["int4_accuracy_level=4"]
        command += ["-p", "int4", "-e", "cpu", "-c", f"{plain}/cache", "--extra_options", *extra]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the builder failed: {done.stderr.strip().splitlines()[-1:]}")


def read_bytes(path: Path) -> int:
    """Bytes of weights that decoding a token reads: all but the embedding's table."""
    if path.suffix == ".gguf":
        import gguf

        tensors = gguf.GGUFReader(path).tensors
        names = {tensor.name for tensor in tensors}
        table = "token_embd.weight" if "output.weight" in names else ""  # else it is the head too
        return sum(int(t.n_bytes) for t in tensors if t.name != table)
    import onnx

    graph = onnx.load(path / "model.onnx", load_external_data=False).graph
    sizes = {
        each.name: int({e.key: e.value for e in each.external_data}.get("length", 0))
        for each in graph.initializer
    }
    looked_up = {
        node.input[0] for node in graph.node if node.op_type in ("Gather", "GatherBlockQuantized")
    }
    elsewhere = {
        name
        for node in graph.node
        for name in node.input
        if node.op_type not in ("Gather", "GatherBlockQuantized")
    }
    return sum(size for name, size in sizes.items() if name not in looked_up - elsewhere)


# Measuring


def bandwidth() -> float:
    """GB/s of two threads that each read half of 512 MiB: the best of two ways of reading, in eight tries each."""
    parts = [np.ones(2**26, np.float32) for _ in range(THREADS)]
    best = 0.0
    for read in (np.max, np.sum):
        for _ in range(8):
            threads = [threading.Thread(target=read, args=(part,)) for part in parts]
            start = time.perf_counter()
            for each in threads:
                each.start()
            for each in threads:
                each.join()
            best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - start))
    return best / 1e9


def measure(cases: list[Case], turns: int, llama: str | None) -> tuple[dict[str, Sample], float]:
    """Medians over the turns, in which every contender runs once; and that of the memory's bandwidth."""
    found: dict[str, list[Sample]] = {label: [] for label, _, _ in cases}
    speeds = []
    for _ in range(turns):
        speeds.append(bandwidth())
        for label, engine, path in cases:
            python = llama if engine == "llama.cpp" else sys.executable
            command = [str(python), __file__, "--one", engine, str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[label].append(json.loads(done.stdout.splitlines()[-1]))
            print(label, found[label][-1], file=sys.stderr)
    medians = {
        label: {key: statistics.median(each[key] for each in samples) for key in samples[0]}
        for label, samples in found.items()
    }
    return medians, statistics.median(speeds)


def spent(path: Path) -> list[str]:
    """The Markdown table of `profile`, the largest first."""
    command = [sys.executable, __file__, "--one", "profile", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = sorted(json.loads(done.stdout.splitlines()[-1]).items(), key=lambda each: -each[1])
    whole = sum(ms for _, ms in found)
    lines = ["| operator, int4 | ms a token | share |", "|---|---|---|"]
    return lines + [f"| {name} | {ms:.2f} | {ms / whole:.0%} |" for name, ms in found[:9]]


def table(cases: list[Case], found: dict[str, Sample], speed: float) -> list[str]:
    """The Markdown table of one model."""
    lines = ["| | MB | prefill | decode | GB/s | of bandwidth |", "|---|---|---|---|---|---|"]
    for label, _, path in cases:
        size, sample = read_bytes(path) / 1e6, found[label]
        rate = size * sample["decode"] / 1e3
        lines.append(
            f"| {label} | {size:.0f} | {sample['prefill']:.0f} | {sample['decode']:.1f} | {rate:.1f} "
            f"| {rate / speed:.0%} |"
        )
    return lines


def pages(found: dict[str, Sample]) -> list[str]:
    """The Markdown table of what moving weights to huge pages costs, and of what it gives."""
    lines = ["| | decode | s to open | MiB then |", "|---|---|---|---|"]
    for to in PACKED:
        if not {f"{to}, {SMALL}", f"{to}, qlx.runtime"} <= set(found):
            continue
        small, huge = found[f"{to}, {SMALL}"], found[f"{to}, qlx.runtime"]
        gain = f"{huge['decode'] / small['decode']:.2f} x"
        both = (
            f"{small[key]:.{digits}f} → {huge[key]:.{digits}f}"
            for key, digits in (("open", 2), ("resident", 0))
        )
        lines.append(f"| {to}, 2 MB for 4 kB | {gain} | {' | '.join(both)} |")
    return lines


def ratios(found: dict[str, Sample]) -> list[str]:
    """What the issue's aims ask for; the better of qlx.runtime and genai on qlx's directory."""
    pairs = [(to, f"{kind}, llama.cpp") for to, kind in PACKED.items()]
    pairs += [(f"{to} and head int8", f"{PACKED[to]} and head Q8_0, llama.cpp") for to in HEADS]
    pairs += [("int4", name) for name in found if name.startswith("genai's")]
    lines = ["| | against | prefill | decode |", "|---|---|---|---|"]
    for to, other in pairs:
        for engine in ("qlx.runtime", "genai"):
            if not {other, f"{to}, {engine}"} <= set(found):
                continue
            ours = found[f"{to}, {engine}"]
            each = (f"{ours[key] / found[other][key]:.2f} x" for key in ("prefill", "decode"))
            lines.append(f"| {to}, {engine} | {other} | {' | '.join(each)} |")
    return lines


def main() -> None:
    """Make what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--vocabulary", type=int, default=4096, help="rows of the random head")
    parser.add_argument("--llama-python", help="an interpreter that has llama-cpp-python")
    parser.add_argument(
        "--tiny", type=Path, help="a merged checkpoint or full run to measure as well"
    )
    parser.add_argument(
        "--room", type=Path, help="where the models are made and kept (default: nowhere)"
    )
    parser.add_argument(
        "--only-make", action="store_true", help="make the models of --room, measure nothing"
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", default="", help="beginnings of names, separated by commas")
    parser.add_argument(
        "--huge-pages",
        action="store_true",
        help="ask Linux for pages of 2 MB in every contender's process",
    )
    given = parser.parse_args()
    if given.one:
        print(json.dumps(ENGINES[given.one[0]](given.one[1])))
        return
    if given.huge_pages:
        os.environ["GLIBC_TUNABLES"] = (
            "glibc.malloc.hugetlb=1"  # the contenders' processes inherit it
        )
    with tempfile.TemporaryDirectory() as temporary:
        room = given.room or Path(temporary)
        room.mkdir(parents=True, exist_ok=True)
        models = {"random": room / "random"}
        if not models["random"].exists():
            random_llama(models["random"], given.quick, given.vocabulary)
        if given.tiny:
            models["tiny"] = given.tiny
        llama = given.llama_python is not None
        cases = {name: cases_of(name, path, room, llama) for name, path in models.items()}
        if given.only_make:
            return
        report: dict[str, Any] = {}
        if not llama:
            print("llama.cpp was not run: name an interpreter that has it with --llama-python.")
        for name, these in cases.items():
            these = [case for case in these if case[0].startswith(tuple(given.only.split(",")))]
            found, speed = measure(these, given.turns, given.llama_python)
            report[name] = {"bandwidth": speed, "ways": found}
            said = f"**{name}**: two threads read {speed:.1f} GB/s"
            tables = [*table(these, found, speed), "", *ratios(found), "", *pages(found)]
            print("\n".join(["", said, "", *tables]))
        print("\n".join(["", *spent(room / "random-int4-onnx")]))
    output = Path(__file__).parent / "output"
    output.mkdir(exist_ok=True)
    (output / "generation.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
