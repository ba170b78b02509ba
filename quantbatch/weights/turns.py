"""Replicas of one node load one after another, for as long as that is quicker.

Nothing is gained by several replicas that read the same 60 GB from a cold disk at once: it is the
disk that all of them wait for, and it then serves several places in turn. Once the files are in the
page cache, nobody has to wait. So one replica of a node reads, and the others look every quarter of
a second whether the files are in memory by now (a read that must not wait for the disk tells,
RWF_NOWAIT, or else mincore) or the first one is done. Where that can't be told they go one after
another. With `model.cache` on a disk the others wait for what the first one stores there: loading
that takes a fraction of quantizing again, and of the memory for files.

The lock is the kernel's (flock) and ends with its holder, however that dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import mmap
import os
import random
import time
from typing import TYPE_CHECKING

from quantbatch.errors import StorageError
from quantbatch.weights.node import locked, node_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.25
SAMPLES = 64
WARM_SHARE = 0.9
"""Files count as in memory when this share of sampled bytes is: some are never read, such as those
of a tensor that stays mapped."""


@contextlib.contextmanager
def turn(digest: str, files: Callable[[], Sequence[Path]]) -> Iterator[None]:
    """Run the body when nobody else on this node reads the same files from a cold disk.

    Args:
        digest: Of the model; who loads another one does not wait.
        files: Returns what would be read now; some or all of them may not be there.
    """
    with contextlib.ExitStack() as held:
        try:
            _wait(held, node_folder("turns") / digest, files)
        except (StorageError, OSError) as error:
            logger.warning("replicas of this node may load at the same time: %s", error)
        yield


def _wait(held: contextlib.ExitStack, lock: Path, files: Callable[[], Sequence[Path]]) -> None:
    """Return when it is our turn, with the lock held unless there is nothing left to wait for."""
    started = time.monotonic()
    waited = False
    while not is_warm(files()):
        if held.enter_context(locked(lock, wait=False)):
            break
        held.close()
        if not waited:
            logger.info(
                "another replica of this node is the first to load this model: waiting until its"
                " weights are in memory, or in the cache"
            )
            waited = True
        time.sleep(LOOK_EVERY_S)
    if waited:
        logger.info("waited %.1f s for it", time.monotonic() - started)


def is_warm(files: Sequence[Path]) -> bool:
    """Tell whether files are there and in the page cache, by samples at random places."""
    try:
        sizes = [path.stat().st_size for path in files]
        if not sum(sizes):
            return False
        drawn = random.choices(range(len(files)), weights=sizes, k=SAMPLES)
        found = [_is_cached(files[i], random.randrange(sizes[i])) for i in drawn]
    except (OSError, AttributeError):
        return False  # not there, or this system can't tell
    return sum(found) >= WARM_SHARE * SAMPLES


def _is_cached(path: Path, offset: int) -> bool:
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.preadv(handle, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return _is_resident(handle, offset)
    finally:
        os.close(handle)


def _is_resident(handle: int, offset: int) -> bool:
    """Ask mincore(2), for file systems without RWF_NOWAIT, such as a container's own.

    For a file that is another user's, and that we may not write, it says yes.
    """
    libc, page = ctypes.CDLL(None), mmap.PAGESIZE
    libc.mmap.restype = ctypes.c_void_p
    start = ctypes.c_long(offset - offset % page)
    address = libc.mmap(None, ctypes.c_size_t(page), mmap.PROT_READ, mmap.MAP_SHARED, handle, start)
    if address == ctypes.c_void_p(-1).value:
        return False
    found, where = ctypes.c_ubyte(), ctypes.c_void_p(address)
    failed = libc.mincore(where, ctypes.c_size_t(page), ctypes.byref(found))
    libc.munmap(where, ctypes.c_size_t(page))
    return not failed and bool(found.value & 1)
