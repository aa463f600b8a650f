"""Tiny merged checkpoints whose adapter has a large effect, made once a session."""

import pytest

from qlx.merging import merge
from tests.adapter_support import NF4, Case, make_adapter, make_base

KINDS = ["vit", "llama"]


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    return {kind: make_base(tmp_path_factory.mktemp("base") / kind, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def merged(tmp_path_factory, bases):
    """A merged checkpoint of each kind; the adapter was trained on NF4."""
    root = tmp_path_factory.mktemp("merged")
    made = {}
    for kind in KINDS:
        adapter = make_adapter(bases[kind], root / f"{kind}-adapter", Case(kind, NF4))
        made[kind] = merge(bases[kind], [adapter.path], root / kind)
    return made
