"""ONNX checkpoints of any size with random weights: what the benchmarks of the runtime open.

    python benchmarks/onnx_models.py /tmp/models vit-base:fp32 vit-base:int4 llama-300m:int4

Each is the directory that `qlx export-onnx` writes, with a probe whose reference is torch's own answer, so that
`qlx verify` takes it. The weights are far from their initial scale, so that outputs spread and mistakes show.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

TEXT = ["def add(first, second):\n    return first + second\n", "The quick brown fox jumps.\n"] * 20
LETTERS = 320
"""Size of the tokenizer's vocabulary; a model's is at least as large."""

VITS = {
    "vit-tiny": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "num_hidden_layers": 12},
    "vit-small": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_hidden_layers": 12},
    "vit-base": {},
}  # fmt: skip
LLAMAS = {
    "llama-15m": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1024, "num_attention_heads": 6},
    "llama-300m": {"hidden_size": 1536, "num_hidden_layers": 10, "intermediate_size": 4096, "num_attention_heads": 16},
}  # fmt: skip
VOCABULARY = {"llama-15m": 8000, "llama-300m": 32000}
SCHEMES = ("fp32", "int8", "int4", "nf4", "fp4", "ternary")


def task_of(name: str) -> Any:
    """The task of a shape."""
    return "image-classification" if name in VITS else "causal-lm"


def build(name: str) -> Any:
    """A transformers model of that shape in eval mode, always the same."""
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        ViTConfig,
        ViTForImageClassification,
    )

    torch.manual_seed(0)
    if name in VITS:
        labels = {index: f"class {index}" for index in range(10)}
        vit = ViTConfig(**VITS[name], id2label=labels, label2id={v: k for k, v in labels.items()})
        return spread(ViTForImageClassification(vit)).eval()
    heads = LLAMAS[name]["num_attention_heads"]
    llama = LlamaConfig(
        **LLAMAS[name], num_key_value_heads=heads // 2, vocab_size=VOCABULARY[name], max_position_embeddings=1024,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return spread(LlamaForCausalLM(llama)).eval()


def spread(model: Any) -> Any:
    """The model with matrices twice as large and uneven norms and biases."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(2.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def quantized(model: Any, scheme: str) -> tuple[Any, Any]:
    """The model with its linear layers in `scheme`, in place, and how they were quantized."""
    from qlx.checkpoint import QuantSpec
    from qlx.quant import quantize_model

    if scheme == "fp32":
        return model, QuantSpec()
    bits = {"int8": 8, "ternary": 2}.get(scheme, 4)
    spec = QuantSpec(
        method="post-training",
        weight_bits=bits,
        scheme=scheme,
        group_size=None if scheme == "ternary" else 64,
        backend="qlx",
    )
    quantize_model(model, spec)
    return model, spec


def probe_inputs(name: str) -> dict[str, Any]:
    """Noise, or padded tokens."""
    random = np.random.default_rng(1)
    if name in VITS:
        return {"pixel_values": random.standard_normal((4, 3, 224, 224)).astype(np.float32)}
    tokens = random.integers(6, LETTERS, (2, 24))
    mask = np.ones_like(tokens)
    mask[0, 17:] = 0
    return {"input_ids": tokens * mask, "attention_mask": mask}


def companions(name: str) -> Mapping[str, bytes]:
    """The small files that serving reads."""
    from qlx.inputs import ImagePreprocessor, train_tokenizer

    if name in VITS:
        return {"preprocessor_config.json": ImagePreprocessor(size=(224, 224)).to_bytes()}
    return dict(train_tokenizer(TEXT, LETTERS))


def make(target: Path, name: str, scheme: str, *, accuracy_level: int = 0) -> Path:
    """Write one directory, unless it is there; returns it."""
    if target.exists():
        return target
    from qlx.checkpoint import (
        Manifest,
        ProbeRecord,
        new_checkpoint,
        next_step,
        seal,
        write_probe,
    )
    from qlx.exporting import build_graph, write_graph
    from qlx.exporting.export import write_language
    from qlx.exporting.fused import can_fuse
    from qlx.models import make_probe
    from qlx.quant import packed_linears

    task = task_of(name)
    model, spec = quantized(build(name), scheme)
    probe = make_probe(model, task, probe_inputs(name), None, has_adapter=False)
    packed_linears(model, accuracy_level=accuracy_level)
    step = next_step("export-onnx", parents=(), options={"layout": "merged", "precision": scheme})
    manifest = Manifest(
        kind="onnx", task=task, tag=f"{name}-{scheme}", quantization=spec, lineage=(step,),
        probe=ProbeRecord(reference="unmerged"),
    )  # fmt: skip
    with new_checkpoint(target) as staging:
        fuse = can_fuse(model, task)
        write_graph(build_graph(model, task, fuse=fuse), staging, task)
        model.config.save_pretrained(staging)
        for file, data in companions(name).items():
            (staging / file).write_bytes(data)
        write_language(model, task, staging, fused=fuse)
        write_probe(staging / "probe.safetensors", probe)
        seal(staging, manifest)
    return target


def main() -> None:
    """Write what is named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="+", metavar="SHAPE:SCHEME[:fast]")
    args = parser.parse_args()
    for item in args.models:
        name, _, scheme = item.partition(":")
        scheme, _, fast = scheme.partition(":")
        level = 4 if fast == "fast" else 0
        if name not in {**VITS, **LLAMAS} or scheme not in SCHEMES:
            sys.exit(
                f"{item}: SHAPE is one of {', '.join([*VITS, *LLAMAS])}, SCHEME one of {', '.join(SCHEMES)}"
            )
        made = make(args.folder / item.replace(":", "-"), name, scheme, accuracy_level=level)
        size = sum(file.stat().st_size for file in made.iterdir())
        print(f"{made}: {size / 2**20:.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
