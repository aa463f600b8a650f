"""Tiny bases and adapters of every shape a merge must handle, made in a second and never trained.

The values are drawn so that every mistake shows: weights far from their initial scale, adapters
whose effect on the logits is large, scaling ≠ 1, and padding in the text inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlx.adapters import adapter_spec, attach_adapter, save_adapter
from qlx.checkpoint import (
    Checkpoint,
    Manifest,
    ProbeRecord,
    QuantSpec,
    new_checkpoint,
    next_step,
    open_checkpoint,
    resolve_source,
    seal,
    write_probe,
)
from qlx.models import (
    STORED_DTYPE,
    load_base,
    make_probe,
    tensor_names,
    torch_float,
    with_quantized_names,
)
from qlx.recipe import AdapterSection

VOCABULARY = 96
TASKS = {"vit": "image-classification", "vitpose": "heatmap"} | dict.fromkeys(
    (
        *("llama", "qwen3", "gpt2", "qwen3_moe", "mixtral"),
        *("mistral", "qwen2", "gemma", "gemma2", "gemma3_text"),
    ),
    "causal-lm",
)
NF4 = QuantSpec(method="qlora", weight_bits=4, scheme="nf4", group_size=64, double_quant=True)
FP4 = NF4.model_copy(update={"scheme": "fp4", "double_quant": False})
NONE = QuantSpec()


def make_base(
    directory: Path, kind: str, dtype: torch.dtype = torch.float32, *, tied=False, seed=0
) -> Path:
    """A plain transformers directory: a model of 2 layers, width 64."""
    torch.manual_seed(seed)
    model = _BUILD[kind](tied)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(3.0)
            elif "norm" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.to(dtype).save_pretrained(directory)
    return directory


def _vit(tied: bool) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            image_size=8,
            patch_size=4,
            num_labels=5,
        )
    )


def _vitpose(tied: bool) -> Any:
    from transformers import VitPoseBackboneConfig, VitPoseConfig, VitPoseForPoseEstimation

    backbone = VitPoseBackboneConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=[16, 24],
        patch_size=[8, 8],
        out_indices=[2],
    )
    return VitPoseForPoseEstimation(VitPoseConfig(backbone_config=backbone, num_labels=3))


def _llama(tied: bool) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=128,
            vocab_size=VOCABULARY,
            max_position_embeddings=32,
            pad_token_id=0,
            tie_word_embeddings=tied,
        )
    )


def _qwen3(tied: bool) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=128,
            vocab_size=VOCABULARY,
            max_position_embeddings=32,
            pad_token_id=0,
            tie_word_embeddings=tied,
        )
    )


def _dense(kind: str, **more: Any) -> Callable[[bool], Any]:
    """A builder of any other architecture whose configuration has the usual names."""

    def build(tied: bool) -> Any:
        import transformers

        config = transformers.CONFIG_MAPPING[kind](
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=128,
            vocab_size=VOCABULARY,
            max_position_embeddings=32,
            pad_token_id=0,
            tie_word_embeddings=tied,
            **more,
        )
        return transformers.AutoModelForCausalLM.from_config(config)

    return build


def _gpt2(tied: bool) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=1))


_SPARSE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "num_experts_per_tok": 3,  # all: with fewer, rounding to 16 bits may send a token elsewhere
}


def _qwen3_moe(tied: bool) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"moe_intermediate_size": 48, "num_experts": 3, "head_dim": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SPARSE, **sizes, tie_word_embeddings=tied))


def _mixtral(tied: bool) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"intermediate_size": 48, "num_local_experts": 3}
    return MixtralForCausalLM(MixtralConfig(**_SPARSE, **sizes, tie_word_embeddings=tied))


_BUILD = {
    "vit": _vit,
    "vitpose": _vitpose,
    "llama": _llama,
    "qwen3": _qwen3,
    "gpt2": _gpt2,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "mistral": _dense("mistral", sliding_window=None),
    "qwen2": _dense("qwen2"),
    "gemma": _dense("gemma"),
    "gemma2": _dense("gemma2", query_pre_attn_scalar=16),
    "gemma3_text": _dense("gemma3_text", query_pre_attn_scalar=16),
}


def inputs_for(kind: str, count: int = 12, image_size: int = 8) -> dict[str, np.ndarray]:
    """Model inputs; texts are padded on the right."""
    random = np.random.default_rng(7)
    if kind in ("vit", "vitpose"):
        size = (image_size, image_size) if kind == "vit" else (16, 24)
        return {"pixel_values": random.standard_normal((count, 3, *size)).astype(np.float32)}
    ids = random.integers(1, VOCABULARY, (count, 10))
    mask = np.ones_like(ids)
    mask[::2, 7:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


@dataclass
class Case:
    """What kind of adapter to make.

    `options` are fields of a recipe's adapter section, `peft` those of a LoraConfig instead.
    `size` scales its effect; `stored` is the dtype the base was loaded in for training.
    """

    kind: str = "llama"
    quant: QuantSpec = NONE
    size: float = 1.0
    image_size: int = 8
    stored: str = "float32"
    seed: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    peft: dict[str, Any] | None = None


def make_adapter(base: Path, target: Path, case: Case) -> Checkpoint:
    """An adapter checkpoint on `base` with a probe of the unmerged model, as training writes it."""
    task = TASKS[case.kind]
    quant = case.quant if case.quant.quantized else None
    model = load_base(base, task, quant=quant, dtype=torch_float(case.stored))
    spec = with_quantized_names(model, case.quant, base) if quant is not None else NONE
    spec = spec.model_copy(update={"extras": spec.extras | {STORED_DTYPE: case.stored}})
    adapted = _attach(model, case, task)
    draw(adapted, case.size, case.seed)
    record = adapter_spec(adapted, tensor_names(adapted, base))
    source = resolve_source(str(base))
    with new_checkpoint(target) as staging:
        save_adapter(adapted, staging)
        (staging / "config.json").write_bytes((base / "config.json").read_bytes())
        inputs = inputs_for(case.kind, image_size=case.image_size)
        probe = make_probe(adapted.eval(), task, inputs, None, True)
        write_probe(staging / "probe.safetensors", probe)
        manifest = Manifest(
            kind="adapter",
            task=task,
            tag="tiny",
            base=source.reference(),
            quantization=spec,
            adapter=record,
            lineage=(next_step("train", parents=(source.fingerprint,)),),
            probe=ProbeRecord(reference="unmerged, fp32"),
        )
        seal(staging, manifest)
    return open_checkpoint(target)


def _attach(model: Any, case: Case, task: str) -> Any:
    if case.peft is None:
        section = AdapterSection(**{"rank": 4, "alpha": 12.0, **case.options})
        return attach_adapter(model, section, task=task)
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 12, **case.peft}))


def draw(adapted: Any, size: float, seed: int) -> None:
    """Give a fresh adapter values as if trained: every part random, the magnitudes near their start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name or "lora_embedding_A" in name:
                parameter.copy_(torch.randn_like(parameter) / 8)
            elif "lora_B" in name or "lora_embedding_B" in name:
                parameter.copy_(torch.randn_like(parameter) * size / 20)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.2 * size * torch.rand_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size / 10)


def flip_rows(adapted: Any, size: float = 1.0, seed: int = 0, rows: int = 3) -> None:
    """Instead of `draw`: the sign of the first rows of every quantized weight is turned.

    On a ternary base the merged weights lie on its own grid then.
    """
    for module in adapted.modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            weight = module.base_layer.dequantize()
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            with torch.no_grad():
                a.zero_()
                b.zero_()
                a[:rows] = weight[:rows]
                b[range(rows), range(rows)] = -2.0 / module.scaling["default"]
