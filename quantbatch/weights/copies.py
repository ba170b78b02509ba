"""Files of a remote store on this node's disk, one copy for all replicas of the node.

    <node folder>/weights/<name>/          a whole copy
    <node folder>/weights/<name>.part/     one that is being fetched, or whose fetcher died
    <node folder>/weights/<name>.lock      held alone to fetch or remove it, shared while it is used

A copy gets its name when all of it is there with the right digests, so a half-fetched one is never
used. When there is no room for another, those that were used least recently go, but for those in
use. A removed file that some process has still mapped keeps its space, and its bytes, until then.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from quantbatch.errors import StorageError
from quantbatch.model.sizes import gib
from quantbatch.weights.node import locked, node_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quantbatch.storage import Store

logger = logging.getLogger(__name__)

THREADS = min(8, os.cpu_count() or 1)
"""SHA-256 of one file takes 1.5 GB/s of a core with the instructions for it; they work without the
interpreter's lock."""
BLOCK_BYTES = 8 << 20
KEPT_FREE = 0.05
"""Share of a disk that copies leave free: Ray stops storing objects on one that is 95 % full
(RAY_local_fs_capacity_threshold)."""


class StoredFile(NamedTuple):
    """A file, and how to know it again."""

    name: str
    size: int
    sha256: str
    """As hex."""


class DamagedError(Exception):
    """A file is not what was stored; says which, and how."""


def describe(path: Path) -> StoredFile:
    """Return a file's size and digest."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return StoredFile(path.name, path.stat().st_size, digest)


def describe_all(folder: Path) -> tuple[StoredFile, ...]:
    """Return size and digest of each file in a folder, by name."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    with ThreadPoolExecutor(THREADS, "digest") as pool:
        return tuple(pool.map(describe, paths))


def check(folder: Path, files: Sequence[StoredFile]) -> None:
    """See that files are what was stored.

    Raises:
        DamagedError: One of them is not.
        StorageError: One of them can't be read, for another reason than damage.
    """
    with ThreadPoolExecutor(THREADS, "digest") as pool:
        for _ in pool.map(lambda file: _check_one(folder / file.name, file), files):
            pass


def _check_one(path: Path, file: StoredFile) -> None:
    try:
        size = path.stat().st_size
        # A file cut short is known without reading it.
        found = describe(path) if size == file.size else StoredFile(file.name, size, "")
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EIO):
            raise DamagedError(f"{file.name}: {error.strerror}") from error
        raise StorageError(f"{path}: {error.strerror}", "check its permissions") from error
    _compare(found, file)


def _compare(found: StoredFile, file: StoredFile) -> None:
    if found.size != file.size:
        raise DamagedError(f"{file.name} has {found.size:,} bytes, not {file.size:,}")
    if found.sha256 != file.sha256:
        raise DamagedError(f"{file.name} has another SHA-256 than when it was stored")


@contextlib.contextmanager
def on_this_node(
    store: Store, prefix: str, files: Sequence[StoredFile], name: str
) -> Iterator[Path]:
    """Give a folder with checked copies of files; it stays while the body runs, and for later.

    Args:
        store: Where they are.
        prefix: Their keys begin with it.
        files: What to copy.
        name: Of the copy, on this node: different files have different ones.

    Raises:
        DamagedError: The store has not what was stored.
        StorageError: The store can't be read, or this node has no room.
    """
    root = node_folder("weights")
    lock, folder = root / f"{name}.lock", root / name
    with contextlib.ExitStack() as held:
        held.enter_context(locked(lock, shared=True))
        while not _is_whole(folder, files):
            held.close()
            with locked(lock):
                if not _is_whole(folder, files):
                    _fetch(store, prefix, files, folder)
            # Between the two locks it may be removed to make room: then it is fetched again.
            held.enter_context(locked(lock, shared=True))
        yield folder


def _is_whole(folder: Path, files: Sequence[StoredFile]) -> bool:
    """Tell whether a copy is there and undamaged; if so, it counts as used now."""
    if not folder.is_dir():
        return False
    try:
        check(folder, files)
    except DamagedError:
        return False
    os.utime(folder)
    return True


def _fetch(store: Store, prefix: str, files: Sequence[StoredFile], folder: Path) -> None:
    part = folder.with_name(f"{folder.name}.part")
    if folder.exists():
        logger.warning("%s is damaged: it is fetched again", folder)
    for old in (folder, part):
        shutil.rmtree(old, ignore_errors=True)
    make_room(folder.parent, sum(file.size for file in files))
    try:
        part.mkdir()
        with ThreadPoolExecutor(THREADS, "fetch") as pool:
            for _ in pool.map(lambda file: _fetch_one(store, prefix, file, part), files):
                pass
        part.rename(folder)
    except FileNotFoundError as error:
        raise DamagedError(f"a file is gone: {error}") from error
    except OSError as error:
        raise StorageError(f"{part}: {error.strerror}", "make room, or set TMPDIR") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _fetch_one(store: Store, prefix: str, file: StoredFile, folder: Path) -> None:
    digest, size = hashlib.sha256(), 0
    with (
        store.open(f"{prefix}/{file.name}", sequential=True) as source,
        (folder / file.name).open("xb") as target,
    ):
        while block := source.read(BLOCK_BYTES):
            target.write(block)
            digest.update(block)
            size += len(block)
    _compare(StoredFile(file.name, size, digest.hexdigest()), file)


def make_room(root: Path, wanted: int) -> None:
    """Remove the copies that were used least recently until so many bytes fit.

    Raises:
        StorageError: They don't, though no copy is left that is not in use.
    """
    copies = sorted(_copies(root), key=_used)
    while (free := shutil.disk_usage(root).free) - wanted < KEPT_FREE * shutil.disk_usage(
        root
    ).total:
        if not copies:
            raise StorageError(
                f"{root}: no room for {gib(wanted)} of weights, {gib(free)} of the disk are free",
                "make room, or set TMPDIR to another disk",
            )
        _remove_unused(copies.pop(0))


def _copies(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()]


def _used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove_unused(folder: Path) -> None:
    name = folder.name.removesuffix(".part")
    with locked(folder.with_name(f"{name}.lock"), wait=False) as ours:
        if ours:
            shutil.rmtree(folder, ignore_errors=True)
