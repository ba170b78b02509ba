"""What a store is; the promises are in the package's docstring."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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
