"""Exports shared by this directory's tests: every layout on every task, each made once."""

import pytest

from qlx.exporting import export_onnx
from tests.adapter_support import FP4, NF4, NONE, Case, make_adapter, make_base
from tests.onnx_support import merged_checkpoint


@pytest.fixture(scope="session")
def room(tmp_path_factory):
    return tmp_path_factory.mktemp("exporting")


@pytest.fixture(scope="session")
def merged(room):
    """{task: a merged checkpoint}."""
    tasks = ("image-classification", "causal-lm")
    return {task: merged_checkpoint(room / f"merged-{task}", task) for task in tasks}


@pytest.fixture(scope="session")
def exported(room, merged):
    """{task: its fp32 export}."""
    return {task: export_onnx(each, room / f"onnx-{task}") for task, each in merged.items()}


@pytest.fixture(scope="session")
def bases(room):
    return {kind: make_base(room / f"base-{kind}", kind) for kind in ("vit", "llama")}


@pytest.fixture(scope="session")
def adapters(room, bases):
    """{(kind, scheme): an adapter checkpoint}."""
    cases = {
        ("vit", "nf4"): Case("vit", NF4, options={"modules_to_save": ("classifier",)}),
        ("llama", "fp4"): Case("llama", FP4, options={"use_rslora": True}),
        ("llama", "none"): Case("llama", NONE, options={"rank_pattern": {"q_proj": 2}}),
    }
    return {
        key: make_adapter(bases[key[0]], room / f"adapter-{key[0]}-{key[1]}", case)
        for key, case in cases.items()
    }


@pytest.fixture(scope="session")
def separate(room, bases, adapters):
    """{(kind, scheme): the export of an unmerged adapter}."""
    return {
        key: export_onnx(each, room / f"onnx-{key[0]}-{key[1]}", base=str(bases[key[0]]))
        for key, each in adapters.items()
    }
