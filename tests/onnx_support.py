"""Tiny checkpoints made from configurations, for the tests of exporting, runtime and serving.

The weights are random but far from their initial scale, so that logits spread and mistakes show.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from qlx.checkpoint import (
    Checkpoint,
    Manifest,
    ProbeRecord,
    next_step,
    open_checkpoint,
    seal,
    write_probe,
)
from qlx.checkpoint.durable import new_checkpoint
from qlx.inputs import ImagePreprocessor, train_tokenizer
from qlx.models import make_probe

TEXTS = [
    "def add(first, second):\n    return first + second\n",
    "The quick brown fox jumps over the lazy dog, again and again.\n",
    "for index, value in enumerate(values):\n    print(index, value)\n",
] * 20
IMAGE, PATCH, CLASSES = 16, 4, 5
VOCABULARY, CONTEXT = 320, 96


def tiny_vit() -> Any:
    """A ViT classifier of 2 layers for 16 × 16 images and 5 classes."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(3)
    labels = {index: f"class {index}" for index in range(CLASSES)}
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=IMAGE,
        patch_size=PATCH,
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
    )
    return spread(ViTForImageClassification(config)).eval()


def tiny_llama() -> Any:
    """A Llama of 2 layers with grouped-query attention and a vocabulary of 320."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(4)
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    return spread(LlamaForCausalLM(config)).eval()


def spread(model: Any) -> Any:
    """The model with weights so large that its outputs depend on every part."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def inputs_for(task: str) -> dict[str, np.ndarray]:
    """A few inputs; the text ones are right padded."""
    random = np.random.default_rng(5)
    if task == "image-classification":
        return {"pixel_values": random.standard_normal((4, 3, IMAGE, IMAGE)).astype(np.float32)}
    ids = random.integers(6, VOCABULARY, (3, 12))
    mask = np.ones_like(ids)
    mask[0, 7:] = 0
    mask[2, 10:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def write_model(directory: Path, model: Any, task: str) -> None:
    """A plain transformers directory with the files that go beside the weights."""
    model.save_pretrained(directory)
    if task == "causal-lm":
        for name, data in train_tokenizer(TEXTS, VOCABULARY).items():
            (directory / name).write_bytes(data)
    else:
        prepare = ImagePreprocessor(size=(IMAGE, IMAGE))
        (directory / "preprocessor_config.json").write_bytes(prepare.to_bytes())


def merged_checkpoint(target: Path, task: str, model: Any = None) -> Checkpoint:
    """A checkpoint of kind `merged` whose probe is the model's own outputs."""
    if model is None:
        model = tiny_vit() if task == "image-classification" else tiny_llama()
    inputs = inputs_for(task)
    with new_checkpoint(target) as staging:
        write_model(staging, model, task)
        write_probe(staging / "probe.safetensors", make_probe(model, task, inputs, None, False))
        step = next_step("merge", parents=(), options={"exact": True})
        seal(
            staging,
            Manifest(
                kind="merged",
                task=task,
                tag=f"tiny_{task}",
                lineage=(step,),
                probe=ProbeRecord(reference="unmerged"),
            ),
        )
    return open_checkpoint(target)


def export_for_tests(task: str, factory: Any) -> tuple[Checkpoint, Any]:
    """An ONNX checkpoint, exported once per test process, and the torch model it was made of."""
    from qlx.exporting import export_onnx

    model = tiny_vit() if task == "image-classification" else tiny_llama()
    room = factory.getbasetemp() / "onnx-shared"
    target = room / f"onnx-{task}"
    if not target.exists():
        export_onnx(merged_checkpoint(room / f"merged-{task}", task, model), target)
    return open_checkpoint(target), model
