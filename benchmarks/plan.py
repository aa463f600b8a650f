"""`qlx plan` beside real peaks: trainings on generated shapes, each in a process of its own, on a CPU.

    python benchmarks/plan.py             # eleven trainings of two steps, a few minutes
    python benchmarks/plan.py --only nf4-ckpt,full

A training's peak is the highest resident memory of its process after loading, libraries and all; what the
imports hold is told apart. The table goes to standard output and to benchmarks/output/plan.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20

TEXT = {"hidden": 512, "layers": 8, "heads": 8, "intermediate": 1408, "vocab": 8192}
IMAGES = {"hidden": 384, "layers": 8, "heads": 6, "intermediate": 1536}


@dataclass(frozen=True)
class Case:
    """One training: what it trains, and how."""

    kind: str = "llama"
    quant: str | None = None
    rank: int = 16
    checkpointing: bool = False
    batch: int = 4
    tokens: int = 128


CASES = {
    "lora": Case(),
    "lora-ckpt": Case(checkpointing=True),
    "nf4": Case(quant="nf4"),
    "nf4-ckpt": Case(quant="nf4", checkpointing=True),
    "int4": Case(quant="int4"),
    "ternary": Case(quant="ternary"),
    "lora-batch-8": Case(batch=8),
    "nf4-256-tokens": Case(quant="nf4", tokens=256),
    "full": Case(rank=0),
    "vit-lora": Case(kind="vit", batch=8),
    "vit-nf4-ckpt": Case(kind="vit", quant="nf4", batch=8, checkpointing=True),
}

RUN = """
import gc, json, sys
from pathlib import Path
from types import SimpleNamespace

def mark(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

case, shape = json.loads(sys.argv[1]), json.loads(sys.argv[2])
import torch, transformers, peft, trl, datasets, accelerate, bitsandbytes
from benchmarks.plan import built
from qlx.adapters import attach_adapter
from qlx.checkpoint import QuantSpec
from qlx.inputs import Encoded
from qlx.quant import quantize_model
from qlx.recipe import AdapterSection, TrainingSection
from qlx.training.trainers import text_trainer
torch.manual_seed(0)
held = mark("VmRSS")
model = built(case["kind"], shape, case["tokens"])
if case["quant"]:
    bits = {"nf4": 4, "int4": 4, "ternary": 2}[case["quant"]]
    quantize_model(model, QuantSpec(method="qlora", weight_bits=bits, scheme=case["quant"], group_size=64,
                                    double_quant=case["quant"] == "nf4", compute_dtype="float32"))
if case["rank"]:
    task = "causal-lm" if case["kind"] == "llama" else "image-classification"
    model = attach_adapter(model, AdapterSection(rank=case["rank"]), task=task)
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # the mark starts anew: loading is not training
section = TrainingSection(max_steps=2, batch_size=case["batch"], gradient_checkpointing=case["checkpointing"])
count = 2 * case["batch"]
if case["kind"] == "llama":
    ids = torch.randint(8, shape["vocab"], (count, case["tokens"])).tolist()
    items = [Encoded(row, row) for row in ids]
    from tokenizers import Tokenizer, models
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"p": 0, "e": 1}, unk_token="p")), pad_token="p", eos_token="e")
    trainer = text_trainer(model, items, tokenizer, section, Path(sys.argv[3]), case["tokens"])
else:
    from qlx.training.trainers import image_trainer
    class Random(torch.utils.data.Dataset):
        def __len__(self): return count
        def __getitem__(self, at): return {"pixel_values": torch.randn(3, 224, 224), "labels": at % 10}
    trainer = image_trainer(model, Random(), section, Path(sys.argv[3]))
trainer._save_checkpoint = lambda *a, **k: None
trainer.held_out = SimpleNamespace(enough=False, due=lambda *_: False)  # nothing is held out here
trainer.train()
print(held, mark("VmHWM"))
"""


def config_of(kind: str, shape: dict[str, int]) -> dict[str, Any]:
    """The `config.json` of a shape."""
    common = {
        "model_type": kind,
        "hidden_size": shape["hidden"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "intermediate_size": shape["intermediate"],
    }
    if kind == "llama":
        return {**common, "num_key_value_heads": shape["heads"], "vocab_size": shape["vocab"]}
    return {
        **common,
        "image_size": 224,
        "patch_size": 16,
        "id2label": {str(at): str(at) for at in range(10)},
    }


def built(kind: str, shape: dict[str, int], tokens: int) -> Any:
    """The model of a shape in fp32, with fresh weights."""
    import transformers

    fields = config_of(kind, shape)
    config = transformers.CONFIG_MAPPING[fields.pop("model_type")].from_dict(fields)
    if kind == "llama":
        config.max_position_embeddings = tokens
        return transformers.AutoModelForCausalLM.from_config(config)
    return transformers.AutoModelForImageClassification.from_config(config)


def planned(case: Case) -> float:
    """Bytes that `qlx plan` says."""
    from qlx.planning import Setup, plan_shape, shape_from_config, weight_format
    from qlx.planning.shapes import ATTENTION, MLP

    shape = shape_from_config(config_of(case.kind, TEXT if case.kind == "llama" else IMAGES))
    weights = weight_format(
        case.quant or "float32", double_quant=case.quant == "nf4",
        scale_bytes=4, group_size=64,
    )  # fmt: skip
    setup = Setup(
        weights=weights, rank=case.rank, roles=(*ATTENTION, *MLP), tokens=case.tokens, batch=case.batch,
        checkpointing=case.checkpointing, compute_bytes=4, device="cpu",
        joined=True, fused_loss=case.kind == "llama",
    )  # fmt: skip
    return plan_shape(shape, setup).total


def measured(case: Case) -> tuple[int, int]:
    """Resident bytes after the imports, and the highest of the training."""
    shape = TEXT if case.kind == "llama" else IMAGES
    with tempfile.TemporaryDirectory(prefix="qlx-plan-") as work:
        done = subprocess.run(
            [sys.executable, "-c", RUN, json.dumps(vars(case)), json.dumps(shape), work],
            capture_output=True, text=True, cwd=ROOT, check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    held, peak = map(int, done.stdout.splitlines()[-1].split())
    return held, peak


def main() -> int:
    """Train each, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(CASES), help="cases, separated by commas")
    rows = []
    print("| training | measured, MiB | planned | error |\n|---|---|---|---|")
    for name in parser.parse_args().only.split(","):
        (held, real), plan = measured(CASES[name]), planned(CASES[name])
        rows.append({"name": name, "imports": held, "measured": real, "planned": plan})
        print(
            f"| {name} | {real / MIB:.0f} | {plan / MIB:.0f} | {plan / real - 1:+.0%} |", flush=True
        )
    output = ROOT / "benchmarks" / "output"
    output.mkdir(exist_ok=True)
    (output / "plan.json").write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
