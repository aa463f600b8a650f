"""save-adapter: from a run byte for byte, from a plain PEFT directory with a probe of its own."""

import json
import subprocess
import sys

import numpy as np
import pytest

from qlx.checkpoint import open_checkpoint, read_probe, resolve_source
from qlx.cli.trial import try_adapter
from qlx.errors import CorruptCheckpoint, InputRefused, Mismatch, Unsupported, UsageError
from qlx.models import forward_logits, load_model
from qlx.training import save_adapter
from qlx.weights import read_tensors, write_tensors

PLAIN_PEFT = """
import sys
sys.modules["qlx"] = None
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
base = AutoModelForImageClassification.from_pretrained(sys.argv[1])
inputs = load_file(sys.argv[2] + "/probe.safetensors")["input.pixel_values"]
plain = base(pixel_values=inputs).logits.detach()
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
print((model(pixel_values=inputs).logits - plain).abs().max().item())
"""


@pytest.mark.parametrize("name", ["digits_run", "python_run_fp4"])
def test_from_a_run(name, request, tmp_path):
    run = open_checkpoint(request.getfixturevalue(name))
    base = request.getfixturevalue(name.split("_")[0] + "_base")
    adapter = save_adapter(run.path, tmp_path / "adapter", base=str(base))
    assert adapter.manifest.kind == "adapter"
    for file in ("adapter_model.safetensors", "probe.safetensors", "config.json"):
        assert (adapter.path / file).read_bytes() == (run.path / file).read_bytes()
    assert (
        not {"optimizer.safetensors", "report.html", "recipe.yaml"} & adapter.manifest.files.keys()
    )
    assert [step.command for step in adapter.manifest.lineage][-2:] == ["train", "save-adapter"]
    assert adapter.manifest.lineage[-1].parents == (run.digest,)
    probe = read_probe(adapter.path)
    logits = forward_logits(
        load_model(adapter, resolve_source(str(base))), run.manifest.task, probe.inputs
    )
    np.testing.assert_allclose(
        logits, probe.reference, rtol=0, atol=1e-5 * np.abs(probe.reference).max()
    )


def test_twice_gives_the_same_bytes(digits_run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    first = save_adapter(digits_run, tmp_path / "first")
    second = save_adapter(digits_run, tmp_path / "elsewhere" / "second")
    assert first.digest == second.digest
    again = save_adapter(first.path, tmp_path / "third")
    assert again.manifest.lineage[-1].parents == (first.digest,)


def test_plain_peft_loads_it_without_qlx(digits_run, digits_base, tmp_path):
    adapter = save_adapter(digits_run, tmp_path / "adapter")
    arguments = [str(digits_base), str(adapter.path)]
    output = subprocess.run(
        [sys.executable, "-c", PLAIN_PEFT, *arguments], check=True, capture_output=True, text=True
    )
    assert float(output.stdout) > 0.1


@pytest.fixture
def peft_directory(digits_base, tmp_path):
    """An adapter as PEFT itself saves it, with trained-like weights and an absolute path inside."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageClassification

    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_pretrained(digits_base)
    adapted = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "v_proj"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    adapted.save_pretrained(tmp_path / "peft")
    return adapted, tmp_path / "peft"


def test_from_a_plain_peft_directory(peft_directory, digits_base, tmp_path):
    adapted, directory = peft_directory
    adapter = save_adapter(directory, tmp_path / "adapter", base=str(digits_base))
    manifest = adapter.manifest
    assert manifest.base.fingerprint == resolve_source(str(digits_base)).fingerprint
    assert (manifest.adapter.rank, manifest.adapter.alpha) == (3, 7.0)
    assert manifest.adapter.tensors["vit.layers.0.attention.q_proj"].endswith(
        "attention.attention.query.weight"
    )
    assert not manifest.quantization.quantized
    assert len(manifest.lineage) == 1
    probe = read_probe(adapter.path)
    expected = forward_logits(adapted, "image-classification", probe.inputs)
    np.testing.assert_allclose(probe.reference, expected, rtol=0, atol=1e-5)
    assert np.abs(probe.base - probe.reference).max() > 0.1
    for file in manifest.files:
        assert str(tmp_path).encode() not in (adapter.path / file).read_bytes(), file
    assert (adapter.path / "preprocessor_config.json").is_file()
    assert (
        save_adapter(directory, tmp_path / "again", base=str(digits_base)).digest == adapter.digest
    )


def test_plain_peft_directory_needs_its_base(peft_directory, python_base, tmp_path):
    _, directory = peft_directory
    with pytest.raises(UsageError, match="--base"):
        save_adapter(directory, tmp_path / "out")
    with pytest.raises((Mismatch, InputRefused)):
        save_adapter(directory, tmp_path / "out", base=str(python_base))
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_size_names_the_tensor_and_both_shapes(
    peft_directory, digits_base, tmp_path
):
    _, directory = peft_directory
    file = directory / "adapter_model.safetensors"
    tensors = read_tensors(file)
    name = next(key for key in tensors if key.endswith("q_proj.lora_A.weight"))
    tensors[name] = tensors[name][:, :32].contiguous()
    write_tensors(file, tensors)
    with pytest.raises(
        Mismatch, match=r"q_proj\.lora_A\S+ is \[3, 32\] in the adapter and \[3, 64\]"
    ):
        save_adapter(directory, tmp_path / "new" / "out", base=str(digits_base))


def test_another_type_of_adapter_is_named_with_what_takes_it(digits_base, tmp_path):
    from peft import IA3Config, get_peft_model
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(digits_base)
    targets = ["q_proj", "v_proj"]
    config = IA3Config(target_modules=targets, feedforward_modules=[])
    get_peft_model(model, config).save_pretrained(tmp_path / "peft")
    with pytest.raises(Unsupported, match=r"type IA3.*`qlx merge`"):
        save_adapter(tmp_path / "peft", tmp_path / "new" / "out", base=str(digits_base))
    with pytest.raises(Unsupported, match=r"type IA3.*`qlx merge`"):
        try_adapter(tmp_path / "peft", str(digits_base))


def test_what_is_no_adapter_is_refused(digits_base, digits_run, python_base, tmp_path):
    with pytest.raises(InputRefused, match="without an adapter"):
        save_adapter(digits_base, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputRefused, match="adapter_config"):
        save_adapter(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(Mismatch):
        save_adapter(digits_run, tmp_path / "out", base=str(python_base))
    assert not (tmp_path / "out").exists()


def test_changed_run_is_refused(digits_run, tmp_path):
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(digits_run, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 12}))
    with pytest.raises(CorruptCheckpoint, match="adapter_config"):
        save_adapter(copy, tmp_path / "out")
