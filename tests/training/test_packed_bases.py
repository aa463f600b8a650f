"""Training on a base that comes as 4-bit codes of bitsandbytes, and everything that follows from it."""

import json
import shutil

import pytest
import torch

from qlx.checkpoint import open_checkpoint
from qlx.cli.trial import try_adapter
from qlx.errors import Mismatch, Unsupported
from qlx.exporting import export_onnx
from qlx.merging import merge
from qlx.packing import pack
from qlx.training import check, save_adapter, train
from qlx.verification import evaluate, verify
from tests.conftest import DIGITS_RUN, PYTHON_RUN, recipe_of

SHORT = {"max_steps": 12, "batch_size": 16, "learning_rate": 5e-3}


def packed_by_transformers(base, target):
    """A plain directory as `save_pretrained` writes it after loading in 4 bits."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    auto = transformers.AutoModelForCausalLM
    auto.from_pretrained(base, quantization_config=config).save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(base / name, target / name)
    return target


def packed_digits(base, target):
    return pack(base, target, to="nf4", min_retention=0.0).path


def packed_python(base, target):
    return packed_by_transformers(base, target)


CASES = {
    "digits": (DIGITS_RUN, packed_digits, 12, "QLORA_w4-nf4"),
    "python": (PYTHON_RUN, packed_python, 14, "QLORA_w4-nf4-dq"),
}


@pytest.mark.parametrize("name", ["python", pytest.param("digits", marks=pytest.mark.exhaustive)])
def test_an_adapter_on_a_packed_base_goes_all_the_way(name, request, tmp_path):
    content, packer, layers, tag = CASES[name]
    base = packer(request.getfixturevalue(f"{name}_base"), tmp_path / "base")
    recipe = recipe_of(content, base, quantization=None, training=SHORT)
    assert len(check(recipe).quantized) == layers
    assert tag in check(recipe).tag
    run = train(recipe, tmp_path / "run")
    spec = run.manifest.quantization
    assert tag in run.manifest.tag
    assert (spec.scheme, spec.group_size, spec.backend) == ("nf4", 64, "bitsandbytes")
    assert len(spec.tensors) == len(spec.modules) == layers
    adapter = save_adapter(run.path, tmp_path / "adapter", base=str(base))
    assert verify(adapter.path, base=str(base)).passed
    assert try_adapter(adapter.path, str(base)).passed
    merged = merge(str(base), [adapter.path], tmp_path / "merged", dtype="float32")
    assert merged.manifest.lineage[-1].options["exact"]
    assert "quantization_config" not in json.loads((merged.path / "config.json").read_text())
    assert verify(merged.path).passed
    scores = [
        evaluate(path, base=b) for path, b in ((adapter.path, str(base)), (merged.path, None))
    ]
    assert scores[0].metrics["loss"] == pytest.approx(scores[1].metrics["loss"], rel=1e-4)
    onnx = export_onnx(adapter.path, tmp_path / "onnx", base=str(base))
    assert verify(onnx.path).passed


def test_a_packed_base_is_bound_by_its_codes(digits_base, tmp_path):
    base = packed_digits(digits_base, tmp_path / "base")
    with pytest.raises(Unsupported, match="bitsandbytes codes already"):
        train(recipe_of(DIGITS_RUN, base, training=SHORT), tmp_path / "again")
    whole = recipe_of(DIGITS_RUN, base, quantization=None, adapter=None, training=SHORT)
    with pytest.raises(Unsupported, match="add the section adapter"):
        train(whole, tmp_path / "whole")
    assert not list(tmp_path.glob("*.partial"))
    run = train(recipe_of(DIGITS_RUN, base, quantization=None, training=SHORT), tmp_path / "run")
    with pytest.raises(Mismatch, match="not the base"):
        merge(str(digits_base), [run.path], tmp_path / "merged")


def test_another_type_of_adapter_needs_the_plain_base(python_base, tmp_path):
    from peft import LoHaConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = packed_by_transformers(python_base, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(python_base)
    loha = get_peft_model(model, LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False))
    loha.save_pretrained(tmp_path / "loha")
    with pytest.raises(Unsupported, match="weights are codes, which PEFT cannot fold a LOHA"):
        merge(str(base), [tmp_path / "loha"], tmp_path / "new" / "merged")
    assert merge(str(python_base), [tmp_path / "loha"], tmp_path / "new" / "merged").path.exists()


def test_a_plain_peft_adapter_records_the_codes_of_its_base(python_base, python_run, tmp_path):
    base = packed_by_transformers(python_base, tmp_path / "base")
    peft = tmp_path / "peft"
    peft.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(python_run / name, peft / name)
    adapter = save_adapter(peft, tmp_path / "adapter", base=str(base))
    assert len(adapter.manifest.quantization.tensors) == 14
    assert verify(adapter.path, base=str(base)).passed
    merged = merge(str(base), [adapter.path], tmp_path / "merged", dtype="float32")
    assert verify(open_checkpoint(merged.path).path).passed
