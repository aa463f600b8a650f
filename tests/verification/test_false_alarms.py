"""No false alarm on correct merges: 206 of them, over models, dtypes, codecs, ranks, sizes and seeds.

A merge proves itself on the probe before it appears, so one that is refused here is a false alarm
as much as one that `verify` finds fault with. Every case is also compared with its adapter, layer
by layer, and a defect in it is caught, so that none passes because nothing was looked at.
"""

from dataclasses import dataclass

import pytest
import torch

from qlx.merging import merge
from qlx.verification import verify
from tests.adapter_support import FP4, NF4, NONE, Case, make_adapter, make_base
from tests.defects import TRAINED, spoil

KINDS = ("vit", "llama", "qwen3", "gpt2")
STORED = (torch.float32, torch.bfloat16)
DTYPES = (None, "float32", "bfloat16", "float16")
CODECS = {"none": NONE, "nf4": NF4, "fp4": FP4}
DRAWN, EVERY = 176, 11  # cases with drawn adapters, and which of them the default suite takes
SENSITIVE = 35  # a scaling of 20: float16 alone moves this model's outputs past the general limit


@dataclass(frozen=True)
class Correct:
    """One merge: which model, how its base is stored, what it is merged into, which adapter."""

    kind: str
    stored: torch.dtype
    dtype: str | None
    codec: str
    seed: int
    options: dict
    size: float

    def __str__(self):
        short = str(self.stored).removeprefix("torch.")
        return f"{self.seed}-{self.kind}-{short}-{self.dtype}-{self.codec}-r{self.options['rank']}"


def case(seed):
    """The case of a number: every combination of neighbours occurs, by coprime strides."""
    kind = KINDS[seed % len(KINDS)]
    options = {"rank": (1, 2, 4, 8, 16)[seed % 5], "alpha": (3.0, 12.0, 20.0)[seed // 2 % 3]}
    if seed % 7 == 0:
        options |= {"use_rslora": True}
    elif seed % 7 == 1:
        options |= {"use_dora": True}
    codec = tuple(CODECS)[seed // 4 % 3]
    if kind == "gpt2":  # its layers are none that the codecs know
        codec, options["target_modules"] = "none", ["c_attn", "c_fc", "c_proj"]
    dtype = DTYPES[seed // 3 % 4]
    return Correct(kind, STORED[seed // 5 % 2], dtype, codec, seed, options, (0.3, 1, 2)[seed % 3])


CASES = [
    pytest.param(
        case(seed),
        id=str(case(seed)),
        marks=[pytest.mark.exhaustive] if seed % EVERY and seed != SENSITIVE else [],
    )
    for seed in range(DRAWN)
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def base(kind, stored):
        if (kind, stored) not in made:
            target = tmp_path_factory.mktemp(kind) / "base"
            made[kind, stored] = make_base(target, kind, stored)
        return made[kind, stored]

    return base


def assert_quiet_and_awake(merged, adapter, base, tmp_path):
    """It passes alone and against its adapter, and fails with one weight shifted."""
    assert verify(merged).passed
    report = verify(merged, against=adapter, base=base, layers=True)
    assert report.passed, report.failures
    assert report.drift.layers
    assert all(
        layer.retention is None or 0.8 < layer.retention < 1.2 for layer in report.drift.layers
    )

    def shift(tensors):
        name = next(
            n for n in sorted(tensors) if "layer" in n or ".h." in n if tensors[n].ndim == 2
        )
        tensors[name] = tensors[name].roll(1, 0)

    assert not verify(spoil(merged, shift)).passed


@pytest.mark.parametrize("correct", CASES)
def test_a_correct_merge_raises_no_alarm(correct, bases, tmp_path):
    base = bases(correct.kind, correct.stored)
    made = Case(
        correct.kind,
        CODECS[correct.codec],
        correct.size,
        seed=correct.seed,
        options=correct.options,
    )
    adapter = make_adapter(base, tmp_path / "adapter", made)
    merge(base, [adapter.path], tmp_path / "merged", dtype=correct.dtype)
    assert_quiet_and_awake(tmp_path / "merged", adapter.path, base, tmp_path)


@pytest.mark.parametrize("onto", ["as-trained", "original"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.exhaustive
def test_a_correct_merge_of_a_trained_adapter_raises_no_alarm(request, tmp_path, name, dtype, onto):
    _, *fixtures = TRAINED[name]
    base, run = (request.getfixturevalue(fixture) for fixture in fixtures)
    merge(base, [run], tmp_path / "merged", dtype=dtype, onto=onto)
    assert verify(tmp_path / "merged").passed
    report = verify(tmp_path / "merged", against=run, base=base, layers=True)
    assert report.passed, report.failures


def test_there_are_more_than_two_hundred_cases_and_they_differ():
    cases = [case(seed) for seed in range(DRAWN)]
    assert len(cases) + len(TRAINED) * 3 * 2 == 206
    chosen = [case(seed) for seed in range(0, DRAWN, EVERY)]
    for some in (cases, chosen):
        assert {c.kind for c in some} == set(KINDS)
        assert {c.dtype for c in some} == set(DTYPES)
        assert {c.codec for c in some} == set(CODECS)
        assert {c.stored for c in some} == set(STORED)
        assert {c.options["rank"] for c in some} == {1, 2, 4, 8, 16}
