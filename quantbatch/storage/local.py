"""A store on a local or network disk."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from quantbatch.errors import StorageError
from quantbatch.storage.contract import PRIVATE, FileInfo
from quantbatch.storage.trouble import explained

if TYPE_CHECKING:
    from collections.abc import Iterator

STALE_READS = 3
"""Of a file that NFS says is stale: each opens what the name leads to now. A full disk, and all
else that a local one says, is no better a moment later, and not tried again; signals that interrupt
a call are Python's own matter (PEP 475)."""


@dataclass(frozen=True)
class LocalStore:
    """A folder on a local or network disk."""

    uri: str

    def _path(self, key: str) -> Path:
        path = Path(self.uri, key)
        # Keys are made of names of strangers' folders, and of what a record names.
        if key.startswith("/") or ".." in path.parts or "\0" in key:
            raise StorageError(f"{self.uri}: {key[:200]!r} names nothing that can be in it")
        return path

    def _target(self, key: str) -> Path:
        """Return the path of an object to write or remove: in this folder, whatever links say."""
        path = self._path(key)
        root, folder = os.path.realpath(self.uri), os.path.realpath(path.parent)
        if folder != root and not folder.startswith(f"{root.rstrip('/')}/"):
            raise StorageError(
                f"{path.parent}: a link in it leads out of {self.uri}, to {folder}",
                "put a folder in the link's place; the whole output may be a link",
            )
        return path

    def read(self, key: str) -> bytes:
        """See `Store`."""
        with explained(self.uri):
            return _read(self._path(key))

    def open(self, key: str, *, sequential: bool = False) -> IO[bytes]:
        """See `Store`."""
        del sequential
        with explained(self.uri):
            return self._path(key).open("rb")

    def info(self, key: str) -> FileInfo:
        """See `Store`."""
        with explained(self.uri):
            return _local_info(key, self._path(key).stat())

    def list(self, prefix: str = "") -> Iterator[FileInfo]:
        """See `Store`."""
        with explained(self.uri):
            yield from self._walk(self._path(prefix), prefix.strip("/"))

    def _walk(self, folder: Path, key: str) -> Iterator[FileInfo]:
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda e: e.name + "/" * e.is_dir()):
                child = f"{key}/{entry.name}" if key else entry.name
                if not _is_text(entry.name):
                    raise StorageError(
                        f"{folder}: the name {entry.name!r} is not UTF-8", "rename it"
                    )
                if entry.is_symlink() and not Path(entry.path).exists():
                    raise StorageError(f"{entry.path}: a link to nothing", "mend or remove it")
                if entry.is_symlink() and _leads_back(folder, entry.path):
                    raise StorageError(
                        f"{entry.path}: a link to a folder that it lies in", "remove it"
                    )
                if entry.is_dir():
                    yield from self._walk(Path(entry.path), child)
                else:
                    # A file may go between listing and looking: another driver's scratch file.
                    with contextlib.suppress(FileNotFoundError):
                        yield _local_info(child, entry.stat())

    def put(self, key: str, data: bytes) -> None:
        """See `Store`."""
        with explained(self.uri, writing=True), self._scratch(key, data) as scratch:
            scratch.replace(self._target(key))
            _sync_folder(self._path(key).parent)

    def put_file(self, key: str, path: Path) -> None:
        """See `Store`."""
        with (
            explained(self.uri, writing=True),
            path.open("rb") as source,
            self._scratch(key, source) as scratch,
        ):
            scratch.replace(self._target(key))
            _sync_folder(self._path(key).parent)

    def take_file(self, key: str, path: Path) -> None:
        """See `Store`; the file becomes the object, without a copy."""
        target = self._target(key)
        with explained(self.uri, writing=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            # Libraries make files that only their owner reads (safetensors 0.8); the object is for
            # whoever may look into the folder.
            path.chmod(target.parent.stat().st_mode & 0o666)
            with path.open("rb") as file:
                os.fsync(file.fileno())
            path.replace(target)
            _sync_folder(target.parent)

    def claim(self, key: str, data: bytes) -> bytes:
        """See `Store`; a hard link fails if its name exists, on NFS too."""
        with explained(self.uri, writing=True):
            with contextlib.suppress(FileExistsError), self._scratch(key, data) as scratch:
                os.link(scratch, self._target(key))
                _sync_folder(self._path(key).parent)
            with contextlib.suppress(FileNotFoundError):
                return _read(self._path(key))
            raise StorageError(f"{self._path(key)}: written, then not found")

    def delete(self, key: str) -> None:
        """See `Store`."""
        with explained(self.uri):
            self._target(key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _scratch(self, key: str, source: bytes | IO[bytes]) -> Iterator[Path]:
        """Write a file that no reader looks at, down to the disk; it is gone afterwards."""
        scratch = self._target(f"{PRIVATE}/scratch/{uuid.uuid4().hex}")
        for folder in (scratch.parent, self._target(key).parent):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with scratch.open("xb") as file:
                for block in (
                    [source]
                    if isinstance(source, bytes)
                    else iter(lambda: source.read(1 << 22), b"")
                ):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            yield scratch
        finally:
            scratch.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    """Read a file, also one that another machine on NFS replaces meanwhile."""
    for left in reversed(range(STALE_READS)):
        try:
            return path.read_bytes()
        except OSError as error:
            if error.errno != errno.ESTALE or not left:
                raise
    raise AssertionError("it was read or it raised")


def _leads_back(folder: Path, link: str) -> bool:
    return f"{os.path.realpath(folder)}/".startswith(f"{os.path.realpath(link).rstrip('/')}/")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _local_info(key: str, stat: os.stat_result) -> FileInfo:
    etag = f"{stat.st_mtime_ns:x}-{stat.st_size:x}"
    return FileInfo(key, stat.st_size, etag, stat.st_mtime)


def _sync_folder(folder: Path) -> None:
    # A rename or link is on disk only when its folder is (ext4 and xfs lose it in a power cut
    # otherwise).
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
