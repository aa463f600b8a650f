"""The directory of an unfinished training is told from anything else that has its name."""

import os

import pytest

from qlx.checkpoint import held
from qlx.errors import UsageError
from qlx.training import train
from qlx.training.work import check_places, working
from tests.conftest import DIGITS_BASE, recipe_of

MARK = ".qlx-training"


@pytest.fixture
def work(tmp_path):
    return tmp_path / "run.partial"


def trained(work, **how):
    train(recipe_of(DIGITS_BASE), work.with_name("run"), **how)


def a_killed_training_left(work):
    """All that one can leave before its first state is there."""
    with working(work.with_name("run"), resume=False, force=False) as made:
        assert [path.name for path in made.iterdir()] == [MARK]
        left = made.with_name("left")
        os.rename(made, left)
        made.mkdir()
    left.rename(work)
    (work / "metrics.jsonl").write_text("")
    (work / "tokenizer.json").write_text("{}")
    for name in ("tokenizer", ".qlx-state-0a_b1c2d"):
        (work / name).mkdir()
        (work / name / "file").write_text("x")


def test_what_a_killed_training_left_is_replaced_and_what_is_added_to_it_stays(work):
    a_killed_training_left(work)
    check_places(recipe_of(DIGITS_BASE), work.with_name("run"))
    with working(work.with_name("run"), resume=False, force=False):
        assert os.listdir(work) == [MARK]
        (work / "notes.txt").write_text("mine")
    assert os.listdir(work) == ["notes.txt"]


def foreign(kind, work):
    """Something at the place of the work directory; what the refusal says of it."""
    if kind == "file":
        work.write_text("mine")
        return "is a file"
    if kind.startswith("link"):
        if kind == "link":
            a_killed_training_left(work.with_name("elsewhere"))
        work.symlink_to(work.with_name("elsewhere"))
        return "is a link"
    if kind != "thesis":
        a_killed_training_left(work)
    if kind == "unmarked":
        (work / MARK).unlink()
        return r"holds \.qlx-state-0a_b1c2d"
    if kind == "inner link":
        (work / "state").symlink_to(work.parent)
        return "holds state"
    work.mkdir(exist_ok=True)
    (work / "thesis.txt").write_text("mine")
    return r"holds thesis\.txt"


@pytest.mark.parametrize("how", [{}, {"force": True}, {"resume": True}])
@pytest.mark.parametrize(
    "kind", ["file", "link", "link to nothing", "unmarked", "inner link", "thesis", "marked thesis"]
)
def test_what_no_training_made_is_left_alone(work, kind, how):
    says = foreign(kind, work)
    before = sorted(work.parent.rglob("*"))
    with pytest.raises(UsageError, match=rf"run\.partial: .*but it {says}, which no training made"):
        trained(work, **how)
    assert sorted(work.parent.rglob("*")) == before


def test_the_state_of_a_living_training_is_left_alone(work):
    work.mkdir()
    with held(work), pytest.raises(UsageError, match=r"run\.partial: another command is writing"):
        trained(work)
