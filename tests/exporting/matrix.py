"""The ONNX matrix: small random models of every architecture, in every form, and what becomes of them.

The table here is the expectation; `export` makes one cell for real. `python -m tests.exporting.matrix`
writes docs/onnx-matrix.md from it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qlx.checkpoint import Checkpoint
from qlx.exporting import export_onnx
from qlx.packing import pack
from tests.onnx_support import CONTEXT, IMAGE, PATCH, VOCABULARY, merged_checkpoint, spread

DOCUMENT = Path(__file__).parents[2] / "docs" / "onnx-matrix.md"
TEXT, PICTURES = "causal-lm", "image-classification"
FORMS = ("fp32", "fp16", "nf4", "int8", "int4", "ternary")
CONV1D = "layers of GPT-2's own kind (Conv1D) are not packed"

_TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": CONTEXT,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
_PICTURES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE,
    "patch_size": PATCH,
}


@dataclass(frozen=True)
class Architecture:
    """A row: a model type with the fields of a small configuration, and the forms it is refused in."""

    name: str
    task: str
    model_type: str
    fields: dict[str, Any]
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def attention(self) -> str:
        """What the graph's attention is; "" for a model without a cache."""
        if self.task == PICTURES:
            return ""
        return "generic" if self.model_type in ("gpt2", "opt") else "fused"


def _text(name: str, model_type: str, *, tied: bool = False, **more: Any) -> Architecture:
    return Architecture(name, TEXT, model_type, _TEXT | {"tie_word_embeddings": tied} | more)


def _pictures(name: str, model_type: str, **more: Any) -> Architecture:
    return Architecture(name, PICTURES, model_type, _PICTURES | more)


_WINDOW = {"sliding_window": 8, "query_pre_attn_scalar": 16}

ARCHITECTURES = (
    _text("Llama", "llama"),
    _text("SmolLM (Llama, tied)", "llama", tied=True),
    _text("Qwen2", "qwen2", tied=True),
    _text("Qwen3", "qwen3"),
    _text("Mistral", "mistral", sliding_window=None),
    _text("Mistral with a window", "mistral", sliding_window=8),
    _text("Gemma", "gemma", tied=True),
    _text("Gemma 2", "gemma2", tied=True, **_WINDOW),
    _text("Gemma 3", "gemma3_text", tied=True, **_WINDOW),
    _text("Phi-3", "phi3", original_max_position_embeddings=CONTEXT),
    Architecture(
        "GPT-2",
        TEXT,
        "gpt2",
        _GPT2 | {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1},
        dict.fromkeys(FORMS[2:], CONV1D),
    ),
    _text("OPT", "opt", tied=True, ffn_dim=128, word_embed_proj_dim=64),
    _text("Mixtral", "mixtral", num_local_experts=3, num_experts_per_tok=2, intermediate_size=48),
    _text("Qwen3-MoE", "qwen3_moe", moe_intermediate_size=48, num_experts=3, num_experts_per_tok=2),
    _pictures("ViT", "vit", intermediate_size=128),
    _pictures("DeiT", "deit", intermediate_size=128),
    _pictures("DINOv2", "dinov2", mlp_ratio=2),
)


def build(architecture: Architecture) -> Any:
    """A random model whose outputs depend on every part."""
    import transformers

    torch.manual_seed(1)
    config = transformers.CONFIG_MAPPING[architecture.model_type](**architecture.fields)
    classes: Callable[..., Any] = transformers.AutoModelForCausalLM
    if architecture.task == PICTURES:
        labels = {at: f"class {at}" for at in range(5)}
        config.id2label, config.label2id = labels, {name: at for at, name in labels.items()}
        classes = transformers.AutoModelForImageClassification
        if architecture.model_type == "deit":  # which the automatic class has twice
            config.architectures = ["DeiTForImageClassification"]
    return spread(classes.from_config(config)).eval()


def export(architecture: Architecture, form: str, room: Path) -> Checkpoint:
    """One cell for real; `room` keeps the merged checkpoint for the next one.

    Raises:
        Unsupported: the form is refused.
    """
    from qlx.checkpoint import open_checkpoint

    target = room / "merged"
    if target.exists():
        merged = open_checkpoint(target)
    else:
        merged = merged_checkpoint(target, architecture.task, build(architecture))
    if form in ("fp32", "fp16"):
        return export_onnx(merged, room / f"onnx-{form}", precision=form)
    packed = pack(merged.path, room / f"packed-{form}", to=form, min_retention=0)
    return export_onnx(packed, room / f"onnx-{form}")


def document() -> str:
    """The table of docs/onnx-matrix.md."""
    lines = [
        "# Which models export to ONNX",
        "",
        "Generated by `python -m tests.exporting.matrix`; `tests/exporting/test_matrix.py` makes every cell for",
        "real, from a small random model of each architecture, and fails when this page is not current.",
        "",
        "**=** the graph gives the outputs of the checkpoint it was made of: in fp32 and packed within 1e-4",
        "(relative, on a padded batch), in fp16 within 0.4 %. **✗** refused before anything is written, with the",
        "reason below. Packed graphs hold the checkpoint's own codes; what packing itself costs is another",
        "question ([packing](packing.md)). *Fused* attention is onnxruntime's own operator, with its cache grown in",
        "place ([how fast](onnx-speed.md)); *generic* is the architecture's own, traced.",
        "",
        f"| architecture | attention | {' | '.join(FORMS)} |",
        "|---|---|" + "---|" * len(FORMS),
    ]
    reasons: list[str] = []
    for row in ARCHITECTURES:
        cells = [_mark(row.refused.get(form), reasons) for form in FORMS]
        lines.append(f"| {row.name} | {row.attention or '–'} | {' | '.join(cells)} |")
    lines += ["", *(f"{at}. {reason}" for at, reason in enumerate(reasons, 1))]
    lines += [
        "",
        "BitNet checkpoints and heatmap models (ViTPose) are exported as well ([finding the ball](heatmap.md)).",
        "A sliding window and experts are part of the graph. Other architectures are refused by name when their",
        "`config.json` is read.",
    ]
    return "\n".join(lines) + "\n"


def _mark(reason: str | None, reasons: list[str]) -> str:
    if reason is None:
        return "="
    if reason not in reasons:
        reasons.append(reason)
    return f"✗ {reasons.index(reason) + 1}"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
