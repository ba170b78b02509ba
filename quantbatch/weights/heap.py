"""Keeps glibc from holding on to what a load has freed.

A block of memory of some size comes from the kernel and goes back there when it is freed. But with
each block that is freed glibc raises that size, up to 32 MiB, and smaller ones then stay in its
heap, between others that are in use (mallopt(3), M_MMAP_THRESHOLD). Quantizing takes several blocks
of megabytes for each matrix: an int8 model of 425 MiB left 746 MiB behind, and 489 with this and
`pieces.py` (measured).
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt, from malloc.h."""
LOADING_BYTES = 1 << 20
"""Above what a piece takes (see `pieces.py`): the kernel fills each block with zeros first, and for
that, loading took a third longer with larger pieces (measured)."""
USUAL_BYTES = 32 << 20
"""Where glibc's own raising ends (DEFAULT_MMAP_THRESHOLD_MAX): it stops with the first mallopt, and
steps of an engine should not ask the kernel for each of their blocks."""


@contextlib.contextmanager
def lean_heap() -> Iterator[None]:
    """Give freed memory back at once while the body runs; does nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, LOADING_BYTES)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, USUAL_BYTES)
        mallopt(M_TRIM_THRESHOLD, 2 * USUAL_BYTES)
