"""What the replicas of one node share: a folder, and locks that the kernel releases when their
holder dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from quantbatch.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator


def node_folder(name: str) -> Path:
    """Return a folder of this user on this node, made if need be.

    It is where temporary files go, which TMPDIR chooses: home folders are often on a network.

    Raises:
        StorageError: It can't be made, or another user could write to it.
    """
    root = Path(tempfile.gettempdir(), f"quantbatch-{os.getuid()}")
    try:
        root.mkdir(mode=0o700, exist_ok=True)
        found = root.lstat()
        # In a folder that all may write to, somebody else can have been first with this name.
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise StorageError(f"{root} is open to other users", "remove it, or set TMPDIR")
        folder = root / name
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(f"{root}: {error.strerror}", "set TMPDIR to another folder") from error
    return folder


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file, which is made if need be and stays.

    Args:
        path: The file.
        shared: Let others hold it too who ask for no more.
        wait: Wait for it; else the body runs without it if others hold it.

    Yields:
        Whether it is held.
    """
    # flock, not lockf: that one is lost when any handle of the file is closed in this process.
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield _lock(handle, shared=shared, wait=wait)
    finally:
        os.close(handle)


def _lock(handle: int, *, shared: bool, wait: bool) -> bool:
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
