"""The gate, for every target alike: a delta below its step fails, a large one passes, and both are told and drawn."""

import os

import pytest

from qlx.checkpoint import QuantSpec
from qlx.errors import CheckFailed
from qlx.packing import GGUF_TYPES, TARGETS, WHOLE, pack
from qlx.packing.picture import _BELOW, _WEIGHTS
from tests import adapter_support
from tests.adapter_support import NF4, Case, flip_rows, make_adapter
from tests.packing.conftest import TERNARY, wide_llama

SMALL = {
    "nf4": 0.02, "fp4": 0.02, "int8": 0.0005, "int4": 0.02, "int2": 0.1, "ternary": 0.1, "F16": 3e-5, "BF16": 2e-4,
    "Q8_0": 0.0005, "Q4_0": 0.02, "Q4_1": 0.02, "Q5_0": 0.01, "Q5_1": 0.01, "TQ1_0": 0.1, "TQ2_0": 0.1,
}  # fmt: skip
"""Sizes of an adapter that are lost in the rounding of each target, or type of GGUF."""
LARGE, GATE = 1.0, 0.8
INT2 = QuantSpec(
    method="qlora", weight_bits=2, scheme="int2", symmetric=False, group_size=64, backend="qlx"
)
CASES = [("llama", to) for to in (*TARGETS[:-1], "Q4_0")]
MORE = [("vit", to) for to in TARGETS[:-1]] + [("llama", to) for to in GGUF_TYPES if to != "Q4_0"]
CASES += [pytest.param(*case, marks=pytest.mark.exhaustive) for case in MORE]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A Llama as wide as the blocks of GGUF's ternary types."""
    return wide_llama(tmp_path_factory.mktemp("wide") / "base")


def options_of(to):
    if to in GGUF_TYPES:
        return {"to": "gguf", "gguf_type": to}
    return {"to": to, "group_size": WHOLE if to == "ternary" else 64 if to == "int2" else None}


@pytest.mark.parametrize(("kind", "to"), CASES)
def test_a_delta_below_a_step_fails_and_a_large_one_passes(
    tmp_path, bases, wide, monkeypatch, kind, to
):
    ternary = to in ("ternary", "TQ1_0", "TQ2_0")
    base = wide if to[:2] == "TQ" else bases[kind]
    few = ternary or to == "int2"  # values a weight can have
    quant = TERNARY if ternary else INT2 if few else NF4
    small = make_adapter(base, tmp_path / "small", Case(kind, quant, size=SMALL[to]))
    if few:  # what their grid can hold
        monkeypatch.setattr(adapter_support, "draw", flip_rows)
    large = make_adapter(base, tmp_path / "large", Case(kind, quant, size=LARGE))
    passed, failed = [], []
    options = options_of(to) | {"base": base, "min_retention": GATE}
    with pytest.raises(CheckFailed, match=r"retention .* \(limit ≥ 0.8\)") as caught:
        pack(
            small.path, tmp_path / "p", **options, report=failed.append, picture=tmp_path / "s.svg"
        )
    assert caught.value.exit_code == 1
    assert "keep the adapter separate" in str(caught.value)
    assert ("--heal" in str(caught.value)) == (to in ("nf4", "fp4", "int8", "int4", "ternary"))
    assert not [name for name in os.listdir(tmp_path) if "p" in name]
    made = pack(
        large.path, tmp_path / "q", **options, report=passed.append, picture=tmp_path / "l.svg"
    )
    step = made.manifest.lineage[-1]
    count = len(made.manifest.adapter.tensors)
    for lines in (passed, failed):
        assert sum("of the weight change survives" in line for line in lines) == count
    assert step.options["weight_retention"] > 0.9
    for picture in ("s.svg", "l.svg"):
        drawn = (tmp_path / picture).read_text()
        assert sum(drawn.count(colour) for colour in (_WEIGHTS, _BELOW)) >= count
    assert _BELOW not in drawn


def test_a_small_delta_that_lies_on_the_grid_of_nothing_is_not_saved_by_healing(tmp_path, bases):
    """Compensation keeps outputs, and there is too little of them to keep."""
    from qlx.packing import Healing

    adapter = make_adapter(bases["llama"], tmp_path / "a", Case("llama", NF4, size=0.02))
    with pytest.raises(CheckFailed, match="retention"):
        pack(adapter.path, tmp_path / "p", to="int4", base=bases["llama"], healing=Healing(steps=2))
    assert sorted(os.listdir(tmp_path)) == ["a"]
