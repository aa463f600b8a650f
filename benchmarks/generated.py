"""Models of any size with adapters, written tensor by tensor: what the merge benchmark runs on.

The values are noise of the size that training leaves. No model is instantiated, so that a model
larger than memory can be generated.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlx.adapters import scaling_of
from qlx.checkpoint import (
    AdapterSpec,
    BaseRef,
    Manifest,
    Probe,
    ProbeRecord,
    QuantSpec,
    fingerprint_directory,
    next_step,
    seal,
    write_probe,
)
from qlx.quant import packed_fingerprint, quantize_tensor
from qlx.weights import open_weights, read_tensor, write_raw, write_tensors

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
RANK, ALPHA = 16, 24


@dataclass(frozen=True)
class Size:
    """A Llama shape; the defaults have 0.85 B parameters, 1.7 GB in bf16."""

    layers: int = 16
    hidden: int = 2048
    intermediate: int = 5632
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 32000
    shards: int = 2

    @property
    def config(self) -> dict[str, Any]:
        """`config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "bfloat16",
        }

    def linear(self, leaf: str) -> tuple[int, int]:
        """[out, in] of a projection."""
        narrow = self.hidden // self.heads * self.kv_heads
        sizes = {
            "k_proj": (narrow, self.hidden),
            "v_proj": (narrow, self.hidden),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }
        return sizes.get(leaf, (self.hidden, self.hidden))

    def modules(self, leaves: Iterable[str]) -> dict[str, tuple[int, int]]:
        """Names and shapes of projections in all layers."""
        return {
            f"model.layers.{at}.{'self_attn' if leaf in ATTENTION else 'mlp'}.{leaf}": self.linear(
                leaf
            )
            for at in range(self.layers)
            for leaf in leaves
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """All tensors, in the order of the layers."""
        norms = [f"model.layers.{at}.{end}_layernorm" for at in range(self.layers)
                 for end in ("input", "post_attention")]  # fmt: skip
        return {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            **{f"{name}.weight": shape for name, shape in self.modules(LINEAR).items()},
            **{f"{name}.weight": (self.hidden,) for name in [*norms, "model.norm"]},
            "lm_head.weight": (self.vocabulary, self.hidden),
        }


def _noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Repeated normal values in bf16; a norm's weight is 1."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    block = (torch.randn(2**20 + seed, generator=generator) / shape[1] ** 0.5).bfloat16()
    count = shape[0] * shape[1]
    return block.repeat(-(-count // len(block)))[:count].reshape(shape)


def make_model(directory: Path, size: Size, seed: int = 0) -> Path:
    """A base in bf16, cut into shards; `seed` makes another one of the same shape."""
    directory.mkdir(parents=True)
    shapes = size.shapes()
    place: dict[str, str] = {}
    for at, name in enumerate(shapes):
        shard = at * size.shards // len(shapes) + 1
        place[name] = f"model-{shard:05d}-of-{size.shards:05d}.safetensors"
    for file in sorted(set(place.values())):
        here = [name for name in shapes if place[name] == file]
        entries = {
            name: ("BF16", shapes[name], _writer(shapes[name], seed + at))
            for at, name in enumerate(here)
        }
        write_raw(directory / file, entries, {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(size.config))
    index = {"metadata": {}, "weight_map": place}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def _writer(shape: tuple[int, ...], seed: int) -> Any:
    return lambda: [_noise(shape, seed).reshape(-1).view(torch.uint8).numpy()]


def make_adapter(
    directory: Path,
    base: Path,
    size: Size,
    leaves: Iterable[str] = ATTENTION,
    quant: QuantSpec | None = None,
    rows: tuple[int, int] = (2, 8),
) -> Path:
    """A PEFT adapter on `base`, with the manifest of one that qlx trained and a probe of noise (`_add_probe`)."""
    directory.mkdir(parents=True)
    modules = size.modules(leaves)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, (outputs, inputs) in modules.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = (
            torch.randn(RANK, inputs, generator=generator) / inputs**0.5
        )
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(outputs, RANK, generator=generator) * 0.05
    write_tensors(directory / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": sorted(leaves),
              "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps(size.config))
    _add_probe(directory, size, rows)
    seal(
        directory, _manifest(base, modules, quant or QuantSpec(extras={"stored_dtype": "float32"}))
    )
    return directory


def make_merged(directory: Path, base: Path, size: Size, rows: tuple[int, int]) -> Path:
    """A merged checkpoint of `base` in which every projection has other values, with a probe of noise."""
    make_model(directory, size, seed=len(size.shapes()))
    _add_probe(directory, size, rows)
    stored = QuantSpec(extras={"stored_dtype": "float32"})
    manifest = _manifest(base, size.modules(LINEAR), stored)
    step = next_step("merge", parents=("sha256:" + "0" * 64,), options={"onto": "original"})
    seal(directory, manifest.with_step(step, kind="merged"))
    return directory


def _add_probe(directory: Path, size: Size, rows: tuple[int, int]) -> None:
    """A probe of noise: `rows` of so many positions, the last two of the first row padding."""
    random = np.random.default_rng(0)
    ids = random.integers(3, size.vocabulary, rows)
    mask = np.ones_like(ids)
    mask[0, -2:] = 0
    noise = random.standard_normal((*rows, size.vocabulary)).astype(np.float32)
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    write_probe(
        directory / "probe.safetensors", Probe("causal-lm", inputs, noise, base=noise[::-1].copy())
    )


def nf4_spec(base: Path, size: Size) -> QuantSpec:
    """The record of a training on `base` with all projections in NF4, double quantization."""
    spec = QuantSpec(
        method="qlora",
        weight_bits=4,
        scheme="nf4",
        group_size=64,
        double_quant=True,
        tensors=tuple(f"{name}.weight" for name in size.modules(LINEAR)),
        extras={"stored_dtype": "bfloat16"},
    )
    weights = open_weights(base)
    codes = ((name, quantize_tensor(read_tensor(weights, name), spec)) for name in spec.tensors)
    return spec.model_copy(update={"fingerprint": packed_fingerprint(codes)})


def _manifest(base: Path, modules: Iterable[str], quant: QuantSpec) -> Manifest:
    spec = AdapterSpec(rank=RANK, alpha=ALPHA, tensors={name: f"{name}.weight" for name in modules})
    assert scaling_of(ALPHA, RANK, use_rslora=False) != 1
    return Manifest(
        kind="adapter",
        task="causal-lm",
        tag="generated",
        base=BaseRef(name=base.name, fingerprint=fingerprint_directory(base)),
        quantization=quant,
        adapter=spec,
        lineage=(next_step("train", parents=()),),
        probe=ProbeRecord(reference="noise"),
    )
