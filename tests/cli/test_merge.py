"""What `qlx merge` says about rounding: the share erased is printed, stored, and refused past a limit."""

import json

import pytest
import torch

from qlx.checkpoint import open_checkpoint
from qlx.cli import main
from tests.adapter_support import Case, make_adapter, make_base


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bf16 base with an adapter that mostly survives rounding, and one that mostly does not survive."""
    root = tmp_path_factory.mktemp("erasure")
    base = make_base(root / "base", "llama", torch.bfloat16)
    for name, size in (("strong", 0.01), ("weak", 0.0005)):
        make_adapter(base, root / name, Case(size=size))
    return root


def merge(made, adapter, output, *options):
    return main(["merge", "--base", str(made / "base"), "--adapter", str(made / adapter),
                 "-o", str(output), "--quiet", *options])  # fmt: skip


def test_the_share_is_printed_and_stored(made, tmp_path, capsys):
    assert merge(made, "strong", tmp_path / "a") == 0
    assert "lost to rounding: " in capsys.readouterr().out
    assert merge(made, "strong", tmp_path / "b", "--json") == 0
    share = json.loads(capsys.readouterr().out)["erased_share"]
    assert 0 < share < 0.5
    stored = open_checkpoint(tmp_path / "b").manifest.lineage[-1].options
    assert stored["erased_share"] == share
    assert "max_erased" not in stored


def test_in_fp32_nothing_is_erased(made, tmp_path, capsys):
    assert merge(made, "weak", tmp_path / "a", "--dtype", "float32") == 0
    assert "lost to rounding: 0.000%" in capsys.readouterr().out


def test_past_the_limit_it_is_refused_with_advice(made, tmp_path, capsys):
    assert merge(made, "weak", tmp_path / "a") == 1
    error = capsys.readouterr().err
    assert "would erase" in error
    assert "--dtype float32" in error
    assert not (tmp_path / "a").exists()


def test_it_can_be_allowed_and_the_allowance_is_recorded(made, tmp_path, capsys):
    assert merge(made, "weak", tmp_path / "a", "--allow-erased", "1") == 0
    assert "lost to rounding: " in capsys.readouterr().out
    options = open_checkpoint(tmp_path / "a").manifest.lineage[-1].options
    assert options["max_erased"] == 1
    assert options["erased_share"] > 0.5
    assert main(["verify", str(tmp_path / "a")]) == 0


def test_the_limit_can_be_made_stricter(made, tmp_path, capsys):
    assert merge(made, "strong", tmp_path / "a", "--allow-erased", "0") == 1
    assert "limit 0%" in capsys.readouterr().err


def test_a_share_is_between_nothing_and_all(made, tmp_path, capsys):
    assert merge(made, "strong", tmp_path / "a", "--allow-erased", "2") == 2


def test_a_dry_run_tells_the_plan_and_writes_nothing(made, tmp_path, capsys):
    assert merge(made, "strong", tmp_path / "a", "--dry-run") == 0
    told = capsys.readouterr().out
    assert "14 of 21 change" in told
    assert "nothing was written" in told
    assert merge(made, "strong", tmp_path / "a", "--dry-run", "--json", "--max-ram", "64GB") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["touched"] == len(open_checkpoint(made / "strong").manifest.adapter.tensors)
    assert data["copied"] + data["rewritten"] == data["read"]
    assert 0 < data["floor"] <= data["held"] + data["working"]
    assert data["proof"] == "replay"
    assert data["max_ram"] == 64 * 10**9
    assert data["seconds"] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_memory_that_cannot_suffice_is_refused_with_the_number(made, tmp_path, capsys, dry):
    assert merge(made, "strong", tmp_path / "a", "--max-ram", "100MB", *dry) == 5
    assert "this merge needs " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert merge(made, "strong", tmp_path / "a", "--max-ram", "much", *dry) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--seed", "3"), "--seed has no meaning"),
        (("--combine", "cat", "--seed", "3"), "--seed has no meaning"),
        (("--density", "0.5"), "--density has no meaning"),
        (("--weight", "1", "--weight", "2"), "2 --weight for 1 --adapter"),
        (("--weight", "nan"), "--weight nan"),
        (("--max-ram", "0"), "'--max-ram'"),
        (("--max-ram", ""), "'--max-ram'"),
    ],
)
def test_options_without_a_meaning_are_refused_by_name(made, tmp_path, capsys, options, says):
    assert merge(made, "strong", tmp_path / "a", *options) == 2
    assert says in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_proof_is_named(made, tmp_path, capsys):
    assert merge(made, "strong", tmp_path / "a") == 0
    assert "checked by replay" in capsys.readouterr().out
