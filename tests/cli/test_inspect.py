"""`qlx inspect` and `qlx migrate` on checkpoints, plain directories, and damaged ones."""

import json

import pytest
import torch

from qlx.cli import main
from qlx.weights import write_tensors


def test_a_checkpoint_is_described_by_its_manifest(adapter, capsys):
    assert main(["inspect", str(adapter)]) == 0
    out = capsys.readouterr().out
    for text in ("adapter of causal-lm", "format version 1", "owner/model@main", "nf4, groups of 64",
                 "double quantization", "lora of rank 8, alpha 16", "1.02K parameters trained (1 %)",
                 "train → save-adapter", "adapter_config.json", "1 files match"):  # fmt: skip
        assert text in out


def test_json_holds_the_manifest_and_what_was_derived(adapter, capsys):
    assert main(["inspect", str(adapter), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    written = json.loads((adapter / "qlx.json").read_text())
    assert data["manifest"] == {name: value for name, value in written.items() if name != "digest"}
    assert (data["kind"], data["size"], data["digests_match"]) == ("adapter", 8, True)


@pytest.mark.parametrize("damage", ["changed", "missing", "added"])
def test_a_damaged_checkpoint_is_refused_by_file_name(adapter, capsys, damage):
    file = adapter / "adapter_config.json"
    if damage == "changed":
        file.write_text('{"r": 9}')
    elif damage == "missing":
        file.unlink()
    else:
        (adapter / "extra.bin").write_bytes(b"x")
    assert main(["inspect", str(adapter)]) == 3
    named = "extra.bin" if damage == "added" else "adapter_config.json"
    assert named in capsys.readouterr().err


def test_a_plain_transformers_directory_is_recognized(plain_model, capsys):
    assert main(["inspect", str(plain_model), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["kind"], data["parameters"], data["dtypes"]) == (
        "plain-transformers",
        2048,
        ["F32"],
    )
    assert main(["inspect", str(plain_model)]) == 0
    assert "LlamaForCausalLM" in capsys.readouterr().out


def test_a_plain_peft_directory_names_the_command_that_takes_it_in(plain_adapter, capsys):
    assert main(["inspect", str(plain_adapter)]) == 0
    out = capsys.readouterr().out
    assert "plain PEFT adapter" in out
    assert f"qlx save-adapter {plain_adapter} -o DIR --base owner/model" in out.replace("\n", " ")


def test_a_plain_peft_directory_whose_weights_are_cut_short_is_refused(plain_adapter, capsys):
    weights = plain_adapter / "adapter_model.safetensors"
    write_tensors(weights, {"base_model.model.x.lora_A.weight": torch.ones(8, 4)})
    assert main(["inspect", str(plain_adapter)]) == 0
    weights.write_bytes(weights.read_bytes()[:-20])
    assert main(["inspect", str(plain_adapter)]) == 3
    assert "adapter_model.safetensors" in capsys.readouterr().err


def test_a_directory_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("x")
    assert main(["inspect", str(tmp_path)]) == 3
    assert "not a qlx checkpoint" in capsys.readouterr().err


def test_migrate_leaves_a_current_checkpoint_alone(adapter, capsys):
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    assert main(["migrate", str(adapter), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["changed"] is False
    assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before


def test_migrate_refuses_a_newer_version(adapter, capsys):
    manifest = json.loads((adapter / "qlx.json").read_text()) | {"format_version": 2}
    (adapter / "qlx.json").write_text(json.dumps(manifest))
    assert main(["migrate", str(adapter)]) == 3
    assert "newer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fixture", "advice"),
    [("plain_adapter", "qlx save-adapter"), ("plain_model", "--base")],
)
def test_migrate_says_which_command_imports_a_plain_directory(fixture, advice, request, capsys):
    assert main(["migrate", str(request.getfixturevalue(fixture))]) == 3
    assert advice in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "mamba"}, "config.json: model_type 'mamba' is not supported"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "config.json: field 'auto_map' can name code"),
        ({"hidden_size": "64"}, "config.json: there is no positive integer hidden_size"),
        ({"num_attention_heads": 0}, "config.json: there is no positive integer num_attention_heads"),
        ({"architectures": 5, "model_type": []}, "config.json: model_type [] is not supported"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_a_base_is_not_recommended_as_one(
    plain_model, capsys, changes, says
):
    file = plain_model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    assert main(["inspect", str(plain_model)]) == 0
    out = capsys.readouterr().out
    assert "cannot be used as a base" in out
    assert says in out
    assert "--base" not in out
