"""Shards: one file when small, numbered ones with an index when not, the same tensors either way."""

import json

import pytest
import torch

from qlx.packing import ShardWriter
from qlx.weights import open_weights, read_tensors


@pytest.fixture
def groups():
    torch.manual_seed(0)
    return [{f"{part}.{leaf}": torch.randn(8, 8) for leaf in ("w", "s")} for part in "abc"]


@pytest.mark.parametrize(("limit", "files"), [(2**20, 1), (600, 3), (1, 3), (1100, 2)])
def test_shards(tmp_path, groups, limit, files):
    writer = ShardWriter(tmp_path, limit)
    for group in groups:
        writer.add(group)
    writer.close()
    weights = open_weights(tmp_path)
    assert len(weights.files) == files
    wanted = {name: tensor for group in groups for name, tensor in group.items()}
    result = read_tensors(tmp_path)
    assert set(result) == set(wanted)
    assert all(torch.equal(result[name], tensor) for name, tensor in wanted.items())
    if files > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 6 * 256
        assert all(len({weights.path_of(f"{part}.{leaf}") for leaf in "ws"}) == 1 for part in "abc")
        assert f"model-00001-of-{files:05d}.safetensors" in set(index["weight_map"].values())
