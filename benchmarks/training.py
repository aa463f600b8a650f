"""Training an adapter: qlx beside TRL + PEFT (text) and transformers' Trainer + PEFT (images), in one run.

    python benchmarks/training.py                 # four rows, about ten minutes on two cores
    python benchmarks/training.py --only text-lora --repeats 3

Same base, data, batch and adapter; every training is a process of its own, and the methods take turns. A
step's time is the median over the steps after the first five; memory is the highest mark of the process up to
the last step, above what the imports hold (qlx has scored the held-out examples by then, too). qlx writes a run
with its probe afterwards, which is not part of a step. Ratios are medians over the repeats, each of which trains
both, with the lowest and the highest.
The table goes to standard output, everything to benchmarks/output/training.json.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

TEXT = ["recipes/python-base.yaml", "recipes/python-qlora.yaml",
        "hidden_size=512", "layers=8", "heads=8", "kv_heads=4", "intermediate_size=1408"]  # fmt: skip
IMAGES = ["recipes/digits-base.yaml", "recipes/digits-qlora.yaml",
          "hidden_size=384", "layers=8", "heads=6", "intermediate_size=1536"]  # fmt: skip
ROWS: dict[str, tuple[list[str], bool]] = {
    "text-lora": (TEXT, False),
    "text-qlora": (TEXT, True),
    "images-lora": (IMAGES, False),
    "images-qlora": (IMAGES, True),
}

_COMMON = """
import json, sys, time
from pathlib import Path

def mark(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

task = json.loads(sys.argv[1])
import torch, transformers, peft, trl, datasets, sklearn, bitsandbytes
"""

QLX = (
    _COMMON
    + """
from qlx.recipe import load_recipe
from qlx.training import train
held = mark("VmRSS")
peaks = []
made = train(load_recipe(Path(task["recipe"]), task["set"]), Path(task["output"]),
             report=lambda line: peaks.append(mark("VmHWM")) if line.startswith("step") else None)
rows = [json.loads(line) for line in (made.path / "metrics.jsonl").read_text().splitlines()]
print(json.dumps({"seconds": [row["seconds"] for row in rows], "loss": rows[-1]["loss"],
                  "memory": peaks[-1] - held}))
"""
)

PEER = (
    _COMMON
    + """
from transformers import (AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer,
                          BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments)
from qlx.inputs import TextCodec, load_split
from qlx.recipe import load_recipe
from qlx.training.trainers import EpochSampler
held = mark("VmRSS")
recipe = load_recipe(Path(task["recipe"]), task["set"])
section, adapter, quantization = recipe.training, recipe.adapter, recipe.quantization
options = {"dtype": torch.float32}
if quantization is not None:
    options["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["lm_head", "classifier"])
text = recipe.task == "causal-lm"
auto = AutoModelForCausalLM if text else AutoModelForImageClassification
model = auto.from_pretrained(task["base"], **options)
if quantization is not None:
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"] if text else task["targets"]
lora = peft.LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=names,
                       task_type="CAUSAL_LM" if text else None)
seconds, losses = [], []

class Clock(TrainerCallback):
    def on_train_begin(self, *_, **__):
        self.start = time.monotonic()
    def on_log(self, arguments, state, control, logs=None, **_):
        if "loss" in logs:
            seconds.append(time.monotonic() - self.start)
            losses.append(logs["loss"])

shared = dict(output_dir=task["output"], per_device_train_batch_size=section.batch_size,
              max_steps=section.max_steps, learning_rate=section.learning_rate, lr_scheduler_type="cosine",
              warmup_steps=section.warmup_ratio, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True,
              disable_tqdm=True, dataloader_pin_memory=False, optim="adamw_torch", seed=0)
split = load_split(recipe.data, "train")
if text:
    codec = TextCodec.from_directory(Path(task["base"]))
    class Ordered(trl.SFTTrainer):
        def _get_train_sampler(self, dataset=None):  # the same batches, whose lengths set their time
            return EpochSampler(len(self.train_dataset), self.args.seed)
    rows = [{"prompt": codec.chat(one.messages[:-1], answer_next=True),
             "completion": one.messages[-1]["content"]} for one in split.examples]
    trainer = Ordered(
        model=model, peft_config=lora, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(task["base"]), callbacks=[Clock()],
        args=trl.SFTConfig(**shared, max_length=recipe.data.max_length, packing=False, bf16=False,
                           gradient_checkpointing=False))
else:
    from qlx.inputs import ImagePreprocessor
    pixels = ImagePreprocessor.from_directory(Path(task["base"]))(list(split.images))
    data = [{"pixel_values": torch.from_numpy(one), "labels": int(label)}
            for one, label in zip(pixels, split.labels)]
    trainer = Trainer(model=peft.get_peft_model(model, lora), train_dataset=data, callbacks=[Clock()],
                      args=TrainingArguments(**shared))
trainer.train()
print(json.dumps({"seconds": seconds, "memory": mark("VmHWM") - held, "loss": losses[-1]}))
"""
)


def main() -> int:
    """Make the bases, train, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(ROWS), help="rows, separated by commas")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="qlx-training-"))
    try:
        runs = [
            run for row in arguments.only.split(",")
            for run in _row(row, work, arguments.steps, arguments.repeats)
        ]  # fmt: skip
    finally:
        shutil.rmtree(work)
    output = Path(__file__).parent / "output"
    output.mkdir(exist_ok=True)
    (output / "training.json").write_text(json.dumps(runs, indent=2) + "\n")
    print(table(runs))
    return 0


def _row(row: str, work: Path, steps: int, repeats: int) -> list[dict[str, Any]]:
    (base_recipe, recipe, *sizes), quantized = ROWS[row]
    base = work / Path(base_recipe).stem
    if not base.exists():
        changes = [f"base.from_scratch.{size}" for size in sizes]
        _qlx("train", base_recipe, "-o", str(base), *_sets([*changes, "training.max_steps=2"]))
    task = {
        "recipe": str(ROOT / recipe),
        "base": str(base),
        "targets": _linear_names(base),
        "set": [
            f"base.path={base}", f"training.max_steps={steps}", "training.log_every=1",
            *([] if quantized else ["quantization="]),
        ],
    }  # fmt: skip
    runs = []
    for at in range(repeats):
        for method in ("qlx", "peer") if at % 2 else ("peer", "qlx"):
            found = _train(method, {**task, "output": str(work / "out")})
            print(f"  {row} {method}: {found['step']:.3f} s a step", file=sys.stderr)
            runs.append({"row": row, "method": method, **found})
            shutil.rmtree(work / "out", ignore_errors=True)
    return runs


def _sets(changes: list[str]) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


def _qlx(*arguments: str) -> None:
    command = [str(Path(sys.executable).with_name("qlx")), *arguments, "--quiet"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def _linear_names(base: Path) -> list[str]:
    """The last parts of the names of all linear layers but the head, as transformers calls them."""
    import transformers
    from torch import nn

    config = transformers.AutoConfig.from_pretrained(base)
    if config.model_type != "vit":
        return []
    model = transformers.AutoModelForImageClassification.from_config(config)
    linear = {
        name.rpartition(".")[2]
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }
    return sorted(linear - {"classifier"})


def _train(method: str, task: dict[str, Any]) -> dict[str, Any]:
    code = QLX if method == "qlx" else PEER
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(task)], capture_output=True, text=True, cwd=ROOT,
        check=False, env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    seconds = found.pop("seconds")
    steps = [after - before for before, after in itertools.pairwise(seconds[5:])]
    return {**found, "step": statistics.median(steps)}


def table(runs: list[dict[str, Any]]) -> str:
    """Medians as Markdown: seconds a step, memory, and the ratios of qlx to the peer with their range."""
    lines = [
        "| | seconds a step: qlx | peer | ratio | MiB above imports: qlx | peer | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in dict.fromkeys(run["row"] for run in runs):
        cells = [row]
        for key, scale, digits in (("step", 1, 3), ("memory", 2**20, 0)):
            qlx, peer = (
                [run[key] for run in runs if (run["row"], run["method"]) == (row, method)]
                for method in ("qlx", "peer")
            )
            ratios = [ours / theirs for ours, theirs in zip(qlx, peer, strict=True)]
            cells += [f"{statistics.median(values) / scale:.{digits}f}" for values in (qlx, peer)]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
