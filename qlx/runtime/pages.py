"""Memory in pages of 2 MB, which Linux reads faster than pages of 4 kB.

Decoding reads every weight once a token, and each page's address must be looked up. Linux gives larger pages to
memory that was asked for them before its first use, which onnxruntime does not do, and since 6.1 it also moves
memory that is in use already (madvise(2), MADV_COLLAPSE): contents and addresses stay.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["HUGE_PAGE", "in_huge_pages"]

HUGE_PAGE = 2 * 1024**2

_COLLAPSE = 25  # MADV_COLLAPSE of <linux/mman.h>; Python's mmap does not name it
_SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPPINGS = Path("/proc/self/maps")


@contextmanager
def in_huge_pages() -> Iterator[None]:
    """Move what is allocated inside to huge pages at the end: on Linux, and unless the machine switched them off.

    Memory that cannot be moved stays as it is, and what was there before is not touched.
    """
    if not _allowed():
        yield
        return
    before = _blocks()
    yield
    _collapse(_blocks() - before)


def _allowed() -> bool:
    try:
        return "[never]" not in _SWITCH.read_text()
    except OSError:
        return False  # not Linux, or built without


def _blocks() -> set[int]:
    """Addresses of the whole blocks of a huge page's size in this process' own writable memory."""
    found: set[int] = set()
    for line in _MAPPINGS.read_text().splitlines():
        span, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
            start, end = (int(address, 16) for address in span.split("-"))
            found.update(range(-(-start // HUGE_PAGE) * HUGE_PAGE, end - HUGE_PAGE + 1, HUGE_PAGE))
    return found


def _collapse(blocks: set[int]) -> None:
    """Ask for each block by itself: untouched ones are refused, and so are all by an older Linux."""
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start in blocks:
        advise(start, HUGE_PAGE, _COLLAPSE)
