"""The only door to a file system.

A `Store` is one folder, local or on S3, and reaches everything under it by keys with forward
slashes. It promises three things, which the ledger needs and `probe` checks (they are those of
Delta's log store):

1. `put` is atomic: a reader sees the whole new object or what was there before.
2. `claim` writes a key only if it does not exist, and says what the key holds afterwards. It never
   says "you won" or "you lost": when the answer to a conditional put gets lost, boto3, s3fs and
   obstore all report their own success as "already exists" (measured). Callers put an attempt id in
   what they claim and compare it with what is there.
3. `list` shows what was put before.

Nothing is streamed to a store from a `with open(...)` block: s3fs commits the partial object when
an exception passes through (measured). Objects are built in memory or in a local scratch file and
put once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shutil
import tempfile
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from typing_extensions import override

from quantbatch.errors import Refused, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantbatch.spec import Storage

PRIVATE = "_quantbatch"
"""Folder of a job's own records under its output; readers of Parquet skip names that begin with
`_`."""


class FileInfo(NamedTuple):
    """One object of a store."""

    key: str
    size: int
    etag: str
    """Changes when the object does: S3's ETag, or size and modification time of a local file."""
    modified_s: float = 0.0
    """When it was last written, in seconds since 1970 by the store's clock, which may not be
    ours."""


class Store(Protocol):
    """A folder of objects. Missing objects raise FileNotFoundError, trouble with the store
    StorageError.
    """

    @property
    def uri(self) -> str:
        """The folder: an absolute local path, or s3://bucket/prefix."""
        ...

    def read(self, key: str) -> bytes:
        """Return the whole object."""
        ...

    def open(self, key: str, *, sequential: bool = False) -> IO[bytes]:
        """Open an object for reading; `sequential` reads ahead, for text."""
        ...

    def info(self, key: str) -> FileInfo:
        """Return size and version of one object."""
        ...

    def list(self, prefix: str = "") -> Iterator[FileInfo]:
        """Yield all objects whose keys begin with `prefix`, a folder name, in the order of their
        keys.
        """
        ...

    def put(self, key: str, data: bytes) -> None:
        """Write a whole object, replacing what is there."""
        ...

    def put_file(self, key: str, path: Path) -> None:
        """Write a whole object from a local file, which may be gone afterwards."""
        ...

    def take_file(self, key: str, path: Path) -> None:
        """Write a whole object from a file in a `scratch_folder`, which is gone afterwards."""
        ...

    def claim(self, key: str, data: bytes) -> bytes:
        """Write a small object if there is none, and return what the key holds now."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""
        ...


def open_store(uri: str, storage: Storage) -> Store:
    """Return the store at a local path, file:// or s3:// URI; opens no connection."""
    if uri.startswith("s3:"):
        if not re.match(r"s3://[^/]", uri):
            raise StorageError(f"{uri}: names no bucket", "write s3://bucket/prefix")
        return S3Store(uri.rstrip("/"), storage)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    if scheme and scheme[1] != "file":
        raise StorageError(
            f"{redact(uri)}: no store is known for {scheme[1]}://",
            "use a local path, file:// or s3://",
        )
    try:
        path = Path(uri.removeprefix("file://")).expanduser()
    except RuntimeError as error:
        raise StorageError(f"{uri}: {error}", "write the path out") from None
    return LocalStore(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links


def redact(text: str) -> str:
    """Take user info and query strings, where credentials hide, out of the URIs in a text."""
    text = re.sub(r"(\w+://)[^/\s@]*@", r"\1", text)
    return re.sub(r"(\w+://[^\s?]*)\?\S*", r"\1", text)


def probe(store: Store) -> None:
    """Refuse a store that can't be written to or that breaks the promises of this module.

    Raises:
        StorageError: The store can't be written.
        Refused: A second claim of a key replaced the first.
    """
    key = f"{PRIVATE}/probe/{uuid.uuid4().hex}"
    first = store.claim(key, b"first")
    second = store.claim(key, b"second")
    store.delete(key)
    if (first, second) != (b"first", b"first"):
        raise Refused(
            f"{redact(store.uri)}: the store replaced an object that a conditional put must keep",
            "an output needs a store that honours If-None-Match, as AWS S3 and local disks do",
        )


@dataclass(frozen=True)
class LocalStore:
    """A folder on a local or network disk."""

    uri: str

    def _path(self, key: str) -> Path:
        path = Path(self.uri, key)
        assert ".." not in path.parts, f"the key {key!r} leaves the store"
        return path

    def read(self, key: str) -> bytes:
        """See `Store`."""
        with _explained(self.uri):
            return self._path(key).read_bytes()

    def open(self, key: str, *, sequential: bool = False) -> IO[bytes]:
        """See `Store`."""
        del sequential
        with _explained(self.uri):
            return self._path(key).open("rb")

    def info(self, key: str) -> FileInfo:
        """See `Store`."""
        with _explained(self.uri):
            return _local_info(key, self._path(key).stat())

    def list(self, prefix: str = "") -> Iterator[FileInfo]:
        """See `Store`."""
        with _explained(self.uri):
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
                if entry.is_dir():
                    yield from self._walk(Path(entry.path), child)
                else:
                    # A file may go between listing and looking: another driver's scratch file.
                    with contextlib.suppress(FileNotFoundError):
                        yield _local_info(child, entry.stat())

    def put(self, key: str, data: bytes) -> None:
        """See `Store`."""
        with _explained(self.uri, writing=True), self._scratch(key, data) as scratch:
            scratch.replace(self._path(key))
            _sync_folder(self._path(key).parent)

    def put_file(self, key: str, path: Path) -> None:
        """See `Store`."""
        with (
            _explained(self.uri, writing=True),
            path.open("rb") as source,
            self._scratch(key, source) as scratch,
        ):
            scratch.replace(self._path(key))
            _sync_folder(self._path(key).parent)

    def take_file(self, key: str, path: Path) -> None:
        """See `Store`; the file becomes the object, without a copy."""
        target = self._path(key)
        with _explained(self.uri, writing=True):
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
        with _explained(self.uri, writing=True):
            with contextlib.suppress(FileExistsError), self._scratch(key, data) as scratch:
                os.link(scratch, self._path(key))
                _sync_folder(self._path(key).parent)
            return self._path(key).read_bytes()

    def delete(self, key: str) -> None:
        """See `Store`."""
        with _explained(self.uri):
            self._path(key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _scratch(self, key: str, source: bytes | IO[bytes]) -> Iterator[Path]:
        """Write a file that no reader looks at, down to the disk; it is gone afterwards."""
        scratch = self._path(f"{PRIVATE}/scratch/{uuid.uuid4().hex}")
        for folder in (scratch.parent, self._path(key).parent):
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


@dataclass(frozen=True)
class S3Store:
    """A prefix of a bucket, through s3fs."""

    uri: str
    storage: Storage

    @cached_property
    def _fs(self) -> Any:  # noqa: ANN401 - s3fs ships no types
        import s3fs  # half a second, and only jobs on S3 need it

        region = {"region_name": self.storage.region} if self.storage.region else {}
        return s3fs.S3FileSystem(
            anon=self.storage.anonymous,
            endpoint_url=self.storage.endpoint_url,
            client_kwargs=region,
            # A store that hangs must become an error: botocore waits 60 s for a connection by
            # default.
            config_kwargs={"connect_timeout": 5, "read_timeout": 60},
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "storage": self.storage}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _path(self, key: str) -> str:
        return f"{self.uri.removeprefix('s3://')}/{key}"

    def read(self, key: str) -> bytes:
        """See `Store`."""
        with _explained(self.uri):
            data: bytes = self._fs.cat_file(self._path(key))
            return data

    def open(self, key: str, *, sequential: bool = False) -> IO[bytes]:
        """See `Store`."""
        with _explained(self.uri):
            file: IO[bytes] = self._fs.open(
                self._path(key),
                "rb",
                # pyarrow asks for exactly the byte ranges that it needs; reading ahead would fetch
                # others.
                cache_type="readahead" if sequential else "none",
                block_size=8 << 20,
            )
            return cast("IO[bytes]", _ExplainedReads(file, self.uri))

    def info(self, key: str) -> FileInfo:
        """See `Store`."""
        with _explained(self.uri):
            return self._info(self._fs.info(self._path(key)))

    def list(self, prefix: str = "") -> Iterator[FileInfo]:
        """See `Store`."""
        with _explained(self.uri):
            found = self._fs.find(self._path(prefix).rstrip("/"), detail=True)
        for name in sorted(found):
            yield self._info(found[name])

    def _info(self, found: dict[str, Any]) -> FileInfo:
        key = found["name"][len(self.uri.removeprefix("s3://")) + 1 :]
        etag = found.get("ETag", "").strip('"')
        modified = found.get("LastModified")  # a prefix that stands for a folder has none
        return FileInfo(key, found["size"], etag, modified.timestamp() if modified else 0.0)

    def put(self, key: str, data: bytes) -> None:
        """See `Store`."""
        with _explained(self.uri):
            self._fs.pipe_file(self._path(key), data)

    def put_file(self, key: str, path: Path) -> None:
        """See `Store`."""
        with _explained(self.uri):
            # In parts of 50 MB, put together at the end: nothing of a broken upload is seen.
            self._fs.put_file(str(path), self._path(key))

    def take_file(self, key: str, path: Path) -> None:
        """See `Store`."""
        self.put_file(key, path)
        path.unlink()

    def claim(self, key: str, data: bytes) -> bytes:
        """See `Store`."""
        with _explained(self.uri):
            failure: Exception | None = None
            try:
                self._fs.pipe_file(self._path(key), data, mode="create")
            except OSError as error:
                # Whatever it says, the object may be there: Ceph answers 412 as OSError, not
                # FileExistsError, and a lost answer looks like a loss. What is there decides.
                failure = error
            try:
                found: bytes = self._fs.cat_file(self._path(key))
            except FileNotFoundError:
                raise failure or StorageError(
                    f"{redact(self.uri)}/{key}: written, then not found"
                ) from failure
            return found

    def delete(self, key: str) -> None:
        """See `Store`."""
        with _explained(self.uri), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(key))


class _ExplainedReads(io.RawIOBase):
    """An open S3 file whose reads fail with our errors; s3fs lets some of botocore's through."""

    def __init__(self, file: IO[bytes], uri: str) -> None:
        super().__init__()
        self._file, self._uri = file, uri

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def read(self, size: int | None = -1) -> bytes:
        with _explained(self._uri):
            return self._file.read(-1 if size is None else size)

    @override
    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    @override
    def tell(self) -> int:
        return self._file.tell()

    @override
    def close(self) -> None:
        self._file.close()
        super().close()


@contextlib.contextmanager
def _explained(uri: str, *, writing: bool = False) -> Iterator[None]:
    """Turn what file systems and botocore raise into one StorageError with a remedy.

    Args:
        uri: The store, for the message.
        writing: Whether a missing file is an error like others: a folder that can't be made.
    """
    try:
        yield
    except FileNotFoundError as error:
        if "specified bucket does not exist" in str(error):
            raise StorageError(
                f"{redact(uri)}: there is no such bucket", "create it, or correct the uri"
            ) from error
        if writing:
            raise StorageError(f"{redact(uri)}: {error}", "choose another folder") from error
        raise
    except PermissionError as error:
        raise StorageError(
            f"{redact(uri)}: access denied ({redact(str(error))})",
            "check the permissions, and for S3 the credentials in the environment",
        ) from error
    except OSError as error:
        raise StorageError(f"{redact(uri)}: {redact(str(error))}", _remedy(error)) from error
    except Exception as error:
        # botocore's exceptions have no common base with OSError, and importing it here would cost
        # 0.3 s.
        if not type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp")):
            raise
        raise StorageError(
            f"{redact(uri)}: {redact(str(error))}",
            "check the endpoint, the region and the credentials",
        ) from error


def _remedy(error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "make room and run the same command again; nothing committed is lost"
        case errno.EROFS:
            return "the file system is read-only: choose another output"
        case errno.ENOTDIR | errno.EEXIST:
            return "a part of the path is a file: choose another path"
        case _:
            return "check the path, or the endpoint and credentials of the store"


@contextlib.contextmanager
def scratch_file() -> Iterator[Path]:
    """Give the path of a local file to build an object in; it is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="quantbatch-") as folder:
        yield Path(folder, "object")


def local_folder(store: Store, key: str) -> Path | None:
    """Return where the objects under a key lie as files; None if they don't, as on S3."""
    return store._path(key) if isinstance(store, LocalStore) else None


@contextlib.contextmanager
def scratch_folder(store: Store, key: str) -> Iterator[Path]:
    """Give a folder to build objects in that `Store.take_file` takes; it is removed afterwards.

    Args:
        store: Where the objects go.
        key: Nobody else's. On a local disk the folder is there, so that no file is copied.
    """
    there = local_folder(store, key)
    if there is None:
        with tempfile.TemporaryDirectory(prefix="quantbatch-") as folder:
            yield Path(folder)
        return
    with _explained(store.uri, writing=True):
        there.mkdir(parents=True)
    try:
        yield there
    finally:
        shutil.rmtree(there, ignore_errors=True)
