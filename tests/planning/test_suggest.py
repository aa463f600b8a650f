"""Tables and suggestions: what is suggested fits, and gives up no more than it must."""

from dataclasses import replace

import pytest

from qlx.planning import PUBLIC_SHAPES, Setup, plan_size, size_table, suggest, weight_format
from qlx.planning.memory import plan_shape

LLAMA = PUBLIC_SHAPES["meta-llama/Llama-3.1-8B"]
LARGE = Setup(rank=64, tokens=8192, batch=8, checkpointing=False, weights=weight_format("bfloat16"))


@pytest.mark.parametrize("available", [10e9, 12e9, 16e9, 24e9, 80e9])
def test_what_is_suggested_fits_and_the_wish_did_not(available):
    assert not plan_shape(LLAMA, LARGE).fits(available)
    plan = suggest(LLAMA, LARGE, available)
    assert plan is not None
    assert plan.total <= available


def test_a_setup_that_fits_is_left_as_it_is():
    plan = suggest(LLAMA, Setup(), 80e9)
    assert plan is not None
    assert plan.setup == Setup()


def test_the_cheapest_concession_comes_first():
    setup = replace(Setup(), checkpointing=False)
    available = plan_shape(LLAMA, Setup()).total
    plan = suggest(LLAMA, setup, available)
    assert plan is not None
    assert plan.setup == Setup()  # only checkpointing changed


def test_double_quantization_is_a_concession_that_keeps_the_groups():
    setup = Setup(weights=weight_format("nf4", group_size=128))
    double = replace(setup, weights=weight_format("nf4", group_size=128, double_quant=True))
    plan = suggest(LLAMA, setup, plan_shape(LLAMA, double).total)
    assert plan is not None
    assert plan.setup == double


def test_nothing_is_suggested_when_nothing_fits():
    assert suggest(LLAMA, LARGE, 3e9) is None


def test_the_table_has_a_plan_for_every_size_and_rank():
    table = size_table((10**9, 7 * 10**9), (8, 64))
    assert [[p.setup.rank for p in row] for row in table.rows] == [[8, 64], [8, 64]]
    assert table.rows[1][0].total == plan_size(7 * 10**9, Setup(rank=8)).total
    assert all(small.total < large.total for small, large in table.rows)
