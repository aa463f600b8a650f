"""Training on one GPU: qlx beside TRL + PEFT on a Llama of one to eight billion random weights.

    python benchmarks/training_gpu.py                             # 1B: LoRA and QLoRA, each with its peer
    python benchmarks/training_gpu.py --size 8B --rows qlora --steps 8
    python benchmarks/training_gpu.py --rows qlora,qlora-compile,qlora-paged,ternary --only qlx

Every row of a batch has `--tokens` tokens of the Python standard library, so both sides compute the same;
batch, adapter, gradient checkpointing and optimizer are the same, and the weights are bfloat16. Each training is
a process of its own. A step's time is the median over the steps after the first five, with the GPU waited for;
memory is PyTorch's peak of allocated and reserved bytes while training; `planned` is what `qlx plan` says
beforehand. The table goes to standard output, everything to benchmarks/output/training_gpu.json.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = 32000

SIZES: dict[str, dict[str, int]] = {
    "1B": {"layers": 16, "hidden": 2048, "intermediate": 8192, "heads": 32, "kv_heads": 8},
    "3B": {"layers": 28, "hidden": 3072, "intermediate": 8192, "heads": 24, "kv_heads": 8},
    "8B": {"layers": 32, "hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8, "shards": 8},
}  # fmt: skip

_NF4 = {"quant_type": "nf4", "double_quant": True, "compute_dtype": "bfloat16"}
ROWS: dict[str, dict[str, Any]] = {
    "lora": {},
    "qlora": {"quantization": _NF4},
    "qlora-compile": {"quantization": _NF4, "training": {"compile": True}},
    "lora-compile": {"training": {"compile": True}},
    "qlora-paged": {"quantization": _NF4, "training": {"optimizer": "paged_adamw_8bit"}},
    "ternary": {"quantization": {"quant_type": "ternary", "compute_dtype": "bfloat16", "group_size": 128}},
    "int4": {"quantization": {"quant_type": "int4", "compute_dtype": "bfloat16", "group_size": 128}},
}  # fmt: skip
QLX_ALONE = ("ternary", "int4")
"""Rows whose layers no peer has."""

_COMMON = """
import json, statistics, sys, time
from pathlib import Path
import torch, transformers
from qlx.inputs import TextCodec, load_split
from qlx.recipe import load_recipe

task = json.loads(sys.argv[1])
recipe = load_recipe(Path(task["recipe"]))
start = time.monotonic()

class Clock(transformers.TrainerCallback):
    def __init__(self):
        self.marks, self.losses = [], []
    def on_train_begin(self, *_, **__):
        torch.cuda.reset_peak_memory_stats()
        self.loaded, self.ready = torch.cuda.memory_allocated(), time.monotonic() - start
    def on_step_end(self, *_, **__):
        torch.cuda.synchronize()
        self.marks.append(time.monotonic())
    def on_log(self, arguments, state, control, logs=None, **_):
        if "loss" in logs:
            self.losses.append(logs["loss"])
    def say(self, **more):
        times = [after - before for before, after in zip(self.marks[5:], self.marks[6:])]
        print(json.dumps({"step": statistics.median(times), "loaded": self.loaded, "ready": self.ready,
                          "allocated": torch.cuda.max_memory_allocated(), "loss": self.losses[-1],
                          "reserved": torch.cuda.max_memory_reserved(), **more}))

clock = Clock()
"""

QLX = (
    _COMMON
    + """
from qlx.training.distributed import join_processes
from qlx.training.job import prepare
from qlx.training.loop import Loop
work = Path(task["output"])
loop = Loop(prepare(recipe, work, lambda line: None), join_processes(), work, work / "state", shard=False)
loop.trainer.held_out.due = lambda *_: False
loop.trainer._save_checkpoint = lambda *_, **__: None
loop.trainer.add_callback(clock)
loop.run()
clock.say()
"""
)

PEER = (
    _COMMON
    + """
import datasets, peft, trl
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
section, adapter, quantization = recipe.training, recipe.adapter, recipe.quantization
options = {"dtype": torch.bfloat16, "device_map": {"": 0}}
if quantization is not None:
    options["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16)
base = recipe.base.path
model = AutoModelForCausalLM.from_pretrained(base, **options)
lora = peft.LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, task_type="CAUSAL_LM", target_modules="all-linear")
codec = TextCodec.from_directory(Path(base))
rows = [codec.encode(one, recipe.data.max_length, completion_only=False)[0]
        for one in load_split(recipe.data, "train").examples]
trainer = trl.SFTTrainer(
    model=model, peft_config=lora, processing_class=AutoTokenizer.from_pretrained(base), callbacks=[clock],
    train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
    args=trl.SFTConfig(
        output_dir=task["output"], per_device_train_batch_size=section.batch_size, max_steps=section.max_steps,
        learning_rate=section.learning_rate, lr_scheduler_type="cosine", logging_steps=1, save_strategy="no",
        report_to=[], disable_tqdm=True, max_length=recipe.data.max_length, packing=False, bf16=True, seed=0,
        gradient_checkpointing=section.gradient_checkpointing, torch_compile=section.compile,
        optim={"adamw": "adamw_torch"}.get(section.optimizer, section.optimizer),
        dataset_kwargs={"skip_prepare_dataset": True}))
trainer.train()
clock.say()
"""
)


def main() -> int:
    """Make the base, train, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1B")
    parser.add_argument("--rows", default="lora,qlora")
    parser.add_argument("--only", default="peer,qlx", help="methods, separated by commas")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=1024, help="of a row")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--layers", type=int, help="instead of the size's own, for a trial")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="qlx-training-gpu-"))
    runs: list[dict[str, Any]] = []
    try:
        base = _base(work, arguments)
        for row in arguments.rows.split(","):
            recipe = _recipe(work, base, row, arguments)
            for method in arguments.only.split(","):
                if method == "peer" and row in QLX_ALONE:
                    continue
                runs.append(_run(method, row, recipe, work, arguments))
                _write(runs)
    finally:
        shutil.rmtree(work)
    print(table(runs))
    return 0


def _base(work: Path, arguments: argparse.Namespace) -> Path:
    """A model of random weights with the tokenizer that a tiny training made, and a file of texts."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from generated import Size, make_model

    small = work / "small"
    sets = ["training.max_steps=1", "base.from_scratch.layers=1", "data.eval_limit=8"]
    command = [
        sys.executable,
        "-m",
        "qlx",
        "train",
        "recipes/python-base.yaml",
        "-o",
        str(small),
        "--quiet",
    ]
    subprocess.run(
        command + [part for one in sets for part in ("--set", one)],
        cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    shape = {**SIZES[arguments.size], **({"layers": arguments.layers} if arguments.layers else {})}
    base = make_model(work / "base", Size(vocabulary=VOCABULARY, **shape))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (small / name).exists():
            shutil.copy(small / name, base)
    _texts(work / "texts.jsonl", 8 * arguments.tokens, (arguments.steps + 2) * arguments.batch)
    return base


def _texts(path: Path, characters: int, count: int) -> None:
    """Pieces of the standard library's sources, each long enough to fill a row."""
    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    text = "".join(source.read_text("utf-8", errors="ignore") for source in sources)
    pieces = [text[at : at + characters] for at in range(0, len(text) - characters, characters)]
    lines = [json.dumps({"text": pieces[at % len(pieces)] + f"\n# {at}"}) for at in range(count)]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _recipe(work: Path, base: Path, row: str, arguments: argparse.Namespace) -> Path:
    import yaml

    changes = dict(ROWS[row])
    training = {"max_steps": arguments.steps, "batch_size": arguments.batch, "learning_rate": 1e-4,
                "warmup_ratio": 0.0, "log_every": 1, "completion_only": False,
                "gradient_checkpointing": arguments.checkpointing}  # fmt: skip
    content = {
        "name": f"gpu-{row}",
        "task": "causal-lm",
        "base": {"path": str(base), "dtype": "bfloat16"},
        "data": {"source": "text", "path": str(work / "texts.jsonl"), "max_length": arguments.tokens,
                 "eval_fraction": 0.05, "eval_limit": 2},
        "adapter": {"rank": 16, "alpha": 32},
        "training": {**training, **changes.pop("training", {})},
        "probe": {"count": 2, "max_length": 16},
        **changes,
    }  # fmt: skip
    path = work / f"{row}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def _run(
    method: str, row: str, recipe: Path, work: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    output = work / "out"
    output.mkdir()
    task = json.dumps({"recipe": str(recipe), "output": str(output)})
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", QLX if method == "qlx" else PEER, task], capture_output=True, text=True,
        cwd=ROOT, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    shutil.rmtree(output)
    if done.returncode:
        print(f"{row} {method} failed:\n{done.stderr[-2500:]}", file=sys.stderr)
        return {"row": row, "method": method, "failed": done.stderr[-2500:]}
    found = json.loads(done.stdout.splitlines()[-1])
    tokens = arguments.batch * arguments.tokens / found["step"]
    found |= {"row": row, "method": method, "tokens_per_second": tokens, "size": arguments.size,
              "planned": _planned(recipe), "whole": time.monotonic() - started}  # fmt: skip
    print(f"  {row} {method}: {found}", file=sys.stderr, flush=True)
    return found


def _planned(recipe: Path) -> float:
    from qlx.planning import plan_recipe
    from qlx.recipe import load_recipe

    return float(plan_recipe(load_recipe(recipe), device="cuda").total)


def _write(runs: list[dict[str, Any]]) -> None:
    output = Path(__file__).parent / "output"
    output.mkdir(exist_ok=True)
    (output / "training_gpu.json").write_text(json.dumps(runs, indent=2) + "\n")


def table(runs: list[dict[str, Any]]) -> str:
    """One line per training: speed, memory, loss and what the plan said."""
    lines = [
        "| | | s a step | tokens/s | GB allocated | GB reserved | GB planned | last loss | ready after s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        if "failed" in run:
            lines.append(f"| {run['row']} | {run['method']} | failed | | | | | | |")
            continue
        memory = (f"{run[key] / 1e9:.2f}" for key in ("allocated", "reserved", "planned"))
        lines.append(
            f"| {run['row']} | {run['method']} | {run['step']:.3f} | {run['tokens_per_second']:,.0f} | "
            f"{' | '.join(memory)} | {run['loss']:.4f} | {run['ready']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
