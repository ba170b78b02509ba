"""A store on S3."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass, field
from functools import cached_property
from typing import IO, TYPE_CHECKING, Any, cast

from typing_extensions import override

from quantbatch.errors import StorageError
from quantbatch.storage.contract import FileInfo
from quantbatch.storage.patience import Patience
from quantbatch.storage.trouble import code_of, explained, redact

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from quantbatch.spec import Storage


PART_BYTES = 50 << 20
"""Of an upload in parts, which larger objects than two of these are."""
PARTS_AT_ONCE = 4
"""Parts of an upload that are in memory and on their way: s3fs's 10 would hold 500 MB."""
UPLOADS = 10
"""Of one object in parts, if the answer to each last call is lost: more than bad luck."""


@dataclass(frozen=True)
class S3Store:
    """A prefix of a bucket, through s3fs."""

    uri: str
    storage: Storage
    known: bool = field(default=False, compare=False)
    """Whether it has answered before. An address that never has is given up soon."""
    patience: Patience = field(default=Patience(), compare=False)

    @cached_property
    def _fs(self) -> Any:  # noqa: ANN401 - s3fs ships no types
        # Half a second, and only jobs on S3 need it.
        from quantbatch.storage.requests import PatientS3

        return PatientS3(self.storage, self.patience, known=self.known)

    @override
    def __getstate__(self) -> dict[str, Any]:
        # It goes to other processes of a job that has found it to be there.
        return {
            "uri": self.uri,
            "storage": self.storage,
            "patience": self.patience,
            "known": True,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _path(self, key: str) -> str:
        return f"{self.uri.removeprefix('s3://')}/{key}"

    def read(self, key: str) -> bytes:
        """See `Store`."""
        with explained(self.uri):
            # At once: else s3fs asks for the size first, to see whether it needs parts of 50 MB.
            data: bytes = self._fs.cat_file(self._path(key), max_concurrency=1)
            return data

    def open(self, key: str, *, sequential: bool = False) -> IO[bytes]:
        """See `Store`."""
        with explained(self.uri):
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
        with explained(self.uri):
            return self._info(self._fs.info(self._path(key)))

    def list(self, prefix: str = "") -> Iterator[FileInfo]:
        """See `Store`."""
        with explained(self.uri):
            found = self._fs.find(self._path(prefix).rstrip("/"), detail=True)
        for name in sorted(found):
            # Where it lists nothing s3fs looks for a file of that name, and finds a folder if a
            # rival has begun meanwhile. Markers that consoles make for folders are no files either.
            if found[name]["type"] == "file" and not name.endswith("/"):
                yield self._info(found[name])

    def _info(self, found: dict[str, Any]) -> FileInfo:
        key = found["name"][len(self.uri.removeprefix("s3://")) + 1 :]
        etag = found.get("ETag", "").strip('"')
        modified = found.get("LastModified")  # a prefix that stands for a folder has none
        return FileInfo(key, found["size"], etag, modified.timestamp() if modified else 0.0)

    def put(self, key: str, data: bytes) -> None:
        """See `Store`."""
        with explained(self.uri):
            self._upload(lambda: self._fs.pipe_file(self._path(key), data, **_in_parts(len(data))))

    def put_file(self, key: str, path: Path) -> None:
        """See `Store`."""
        with explained(self.uri):
            parts = _in_parts(path.stat().st_size)
            self._upload(lambda: self._fs.put_file(str(path), self._path(key), **parts))

    def _upload(self, whole: Callable[[], None]) -> None:
        """Do an upload, again from its beginning if the store knows nothing of its parts.

        So a store says when it did put them together, and its answer was lost: to ask again then
        finds no parts. (AWS remembers for a while, and says that all is well.)
        """
        for left in reversed(range(UPLOADS)):
            try:
                whole()
            except FileNotFoundError as error:
                if code_of(error) != "NoSuchUpload" or not left:
                    raise
            else:
                return

    def take_file(self, key: str, path: Path) -> None:
        """See `Store`."""
        self.put_file(key, path)
        path.unlink()

    def claim(self, key: str, data: bytes) -> bytes:
        """See `Store`."""
        with explained(self.uri):
            failure: OSError | None = None
            try:
                self._fs.pipe_file(self._path(key), data, mode="create")
            except OSError as error:
                # Whatever it says, the object may be there: Ceph answers 412 as OSError, not
                # FileExistsError, and a lost answer looks like a loss. What is there decides.
                failure = error
            with contextlib.suppress(FileNotFoundError):
                found: bytes = self._fs.cat_file(self._path(key), max_concurrency=1)
                return found
            raise failure or StorageError(f"{redact(self.uri)}/{key}: written, then not found")

    def delete(self, key: str) -> None:
        """See `Store`."""
        with explained(self.uri), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(key))


def _in_parts(nbytes: int) -> dict[str, int]:
    """Return s3fs's options for an upload; S3 takes 10,000 parts."""
    return {
        "chunksize": max(PART_BYTES, -(-nbytes // 10_000)),
        "max_concurrency": PARTS_AT_ONCE,
    }


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
        with explained(self._uri):
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
