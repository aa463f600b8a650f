"""Bases are named by the content of their weights."""

from pathlib import Path

import pytest
import torch

from qlx.checkpoint import (
    AdapterSpec,
    BaseRef,
    Manifest,
    new_checkpoint,
    require_base,
    resolve_source,
    seal,
)
from qlx.errors import InputRefused, Mismatch
from qlx.weights import write_tensors

MARK = "sha256:" + "ab" * 32


def plain(path: Path, seed: int = 0) -> Path:
    path.mkdir()
    write_tensors(
        path / "model.safetensors",
        {"w": torch.randn(3, generator=torch.Generator().manual_seed(seed))},
    )
    return path


def test_plain_directory_is_fingerprinted_and_matched(tmp_path: Path) -> None:
    right, wrong = (
        resolve_source(str(plain(tmp_path / "a"))),
        resolve_source(str(plain(tmp_path / "b", seed=1))),
    )
    manifest = Manifest(kind="run", task="causal-lm", tag="t", base=right.reference())
    require_base(manifest, right)
    with pytest.raises(Mismatch, match="not the base"):
        require_base(manifest, wrong)
    assert right.reference().name == "a"


def test_an_adapter_cannot_be_a_base(tmp_path: Path) -> None:
    with new_checkpoint(tmp_path / "x") as staging:
        (staging / "f").write_text("x")
        spec = AdapterSpec(rank=1, alpha=1)
        seal(
            staging,
            Manifest(
                kind="adapter",
                task="causal-lm",
                tag="t",
                base=BaseRef(name="b", fingerprint=MARK),
                adapter=spec,
            ),
        )
    with pytest.raises(InputRefused, match="cannot be a base"):
        resolve_source(str(tmp_path / "x"))


@pytest.mark.parametrize(
    "name", ["nowhere", "./nowhere", "../nowhere", "~/at", "/nowhere/at", "here/at", "runs/at"]
)
def test_missing_directories_are_said_so(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path is not taken for a hub model where it can be told apart."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputRefused, match=r"no such directory.*train it first"):
        resolve_source(name)


@pytest.mark.parametrize(("name", "revision"), [("{}@main", None), ("{}", "main")])
def test_a_directory_has_no_revision(name: str, revision: str | None, tmp_path: Path) -> None:
    with pytest.raises(
        InputRefused, match=r"a local directory has no revision; leave out '@?main'"
    ):
        resolve_source(name.format(plain(tmp_path / "a")), revision)


def test_hub_names_without_a_network_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "owner").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("owner/model@main", "other/model"):
        with pytest.raises(InputRefused, match="the hub cannot be reached; download") as error:
            resolve_source(name)
        assert "\n" not in str(error.value)
