"""Memory moved to huge pages: more of them afterwards, the same contents, nothing else touched."""

from contextlib import contextmanager
from pathlib import Path

import pytest

from qlx.runtime import open_model, pages, session

SIZE = 16 * pages.HUGE_PAGE


def huge_bytes():
    """How much of this process' memory is in huge pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages"))


def filled():
    """Some memory in use; numpy would ask for huge pages itself."""
    block = bytearray(SIZE)
    block[::4096] = bytes(at % 251 for at in range(SIZE // 4096))
    return block


@pytest.fixture
def movable():
    """Skip where Linux has no huge pages or is too old to move memory."""
    if not pages._allowed():
        pytest.skip("no huge pages here")
    block, before = filled(), huge_bytes()
    pages._collapse(pages._blocks())
    if huge_bytes() - before < SIZE // 2:
        pytest.skip("this Linux moves no memory to huge pages")
    del block


@pytest.mark.usefixtures("movable")
def test_what_is_allocated_inside_is_moved_and_keeps_its_contents():
    before = huge_bytes()
    with pages.in_huge_pages():
        block = filled()
        assert huge_bytes() - before < SIZE // 2  # not by itself
    assert huge_bytes() - before >= SIZE - 2 * pages.HUGE_PAGE
    assert block == filled()


@pytest.mark.usefixtures("movable")
def test_what_was_there_before_stays():
    there, before = filled(), huge_bytes()
    with pages.in_huge_pages():
        pass
    assert huge_bytes() - before < SIZE // 2
    assert there == filled()


@pytest.mark.parametrize("switch", ["always madvise [never]\n", None])
def test_switched_off_or_unknown_moves_nothing(switch, tmp_path, monkeypatch):
    if switch is not None:
        (tmp_path / "enabled").write_text(switch)
    monkeypatch.setattr(pages, "_SWITCH", tmp_path / "enabled")
    monkeypatch.setattr(pages, "_collapse", lambda blocks: pytest.fail("moved"))
    with pages.in_huge_pages():
        block = filled()
    assert block == filled()


def test_weights_of_language_models_are_moved_and_no_others(llama, vit, monkeypatch):
    moved = []

    @contextmanager
    def noted():
        yield
        moved.append("session")

    monkeypatch.setattr(session, "in_huge_pages", noted)
    open_model(vit[0].path)
    assert moved == []
    open_model(llama[0].path)
    assert moved == ["session"]
