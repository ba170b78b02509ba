"""A store on S3."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from functools import cached_property
from typing import IO, TYPE_CHECKING, Any, cast

from typing_extensions import override

from quantbatch.errors import StorageError
from quantbatch.storage.contract import FileInfo
from quantbatch.storage.trouble import explained, redact

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from quantbatch.spec import Storage


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
        with explained(self.uri):
            data: bytes = self._fs.cat_file(self._path(key))
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
            yield self._info(found[name])

    def _info(self, found: dict[str, Any]) -> FileInfo:
        key = found["name"][len(self.uri.removeprefix("s3://")) + 1 :]
        etag = found.get("ETag", "").strip('"')
        modified = found.get("LastModified")  # a prefix that stands for a folder has none
        return FileInfo(key, found["size"], etag, modified.timestamp() if modified else 0.0)

    def put(self, key: str, data: bytes) -> None:
        """See `Store`."""
        with explained(self.uri):
            self._fs.pipe_file(self._path(key), data)

    def put_file(self, key: str, path: Path) -> None:
        """See `Store`."""
        with explained(self.uri):
            # In parts of 50 MB, put together at the end: nothing of a broken upload is seen.
            self._fs.put_file(str(path), self._path(key))

    def take_file(self, key: str, path: Path) -> None:
        """See `Store`."""
        self.put_file(key, path)
        path.unlink()

    def claim(self, key: str, data: bytes) -> bytes:
        """See `Store`."""
        with explained(self.uri):
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
        with explained(self.uri), contextlib.suppress(FileNotFoundError):
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
