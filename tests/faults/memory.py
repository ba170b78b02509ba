"""A store in memory, with a clock for what was written when; it stands for S3 or a disk.

`Objects` is what everybody shares, and never fails. A `MemoryStore` is one process's way to it:
each of its calls first asks `turn`, which may let other processes go on in the meantime, and which
says what goes wrong with the call. A put is atomic, as those of S3 and of `LocalStore` are.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

from quantbatch.errors import StorageError
from quantbatch.storage import FileInfo

ResultT = TypeVar("ResultT")


class Killed(BaseException):
    """Ends a simulated process where it is; nothing in the product may catch it."""


class Fault(StrEnum):
    """What goes wrong with a call of a store."""

    NONE = "none"
    FAIL_BEFORE = "fail before"
    """An error, and no effect."""
    FAIL_AFTER = "fail after"
    """The effect, and an error: the answer is lost."""
    KILL_BEFORE = "kill before"
    KILL_AFTER = "kill after"
    TWICE = "twice"
    """The answer is lost, and the store's client asks again on its own: the effect comes twice,
    with time between, and of a conditional put the client hears of the second one only."""


class Write(NamedTuple):
    """A change of an object, as whoever watches the objects is told of it."""

    key: str
    before: bytes | None
    after: bytes | None


@dataclass
class Objects:
    """All objects of a store."""

    found: dict[str, bytes] = field(default_factory=dict)
    written: dict[str, float] = field(default_factory=dict)
    clock_s: float = 1_800_000_000.0
    """The store's clock, in seconds since 1970."""
    watch: Callable[[Write], None] = lambda _: None
    """Is told of each change, after it."""

    def set(self, key: str, data: bytes) -> None:
        before = self.found.get(key)
        self.found[key] = data
        self.clock_s += 0.01
        self.written[key] = self.clock_s
        self.watch(Write(key, before, data))

    def remove(self, key: str) -> None:
        if key in self.found:
            before = self.found.pop(key)
            self.watch(Write(key, before, None))

    def info(self, key: str) -> FileInfo:
        data = self.found[key]
        return FileInfo(key, len(data), hashlib.md5(data).hexdigest(), self.written[key])

    def under(self, prefix: str) -> list[FileInfo]:
        folder = prefix.strip("/") + "/" if prefix.strip("/") else ""
        return [self.info(key) for key in sorted(self.found) if key.startswith(folder)]


Turn = Callable[[str, str], Fault]
"""Told the name of a call and its key before its effect; says what goes wrong with it."""


def nothing_wrong(name: str, key: str) -> Fault:
    """Let a call have its way."""
    del name, key
    return Fault.NONE


class MemoryStore:
    """One process's way to shared objects; see `quantbatch.storage.Store`."""

    def __init__(self, uri: str, objects: Objects, turn: Turn = nothing_wrong) -> None:
        self.uri = uri
        self.objects = objects
        self._turn = turn

    def _call(self, name: str, key: str, effect: Callable[[], ResultT]) -> ResultT:
        fault = self._turn(name, key)
        if fault is Fault.FAIL_BEFORE:
            raise StorageError(f"simulated: {name} {key} failed")
        if fault is Fault.KILL_BEFORE:
            raise Killed
        result = effect()
        if fault is Fault.TWICE:
            if self._turn(f"{name} again", key) is Fault.KILL_BEFORE:
                raise Killed
            result = effect()
        if fault is Fault.FAIL_AFTER:
            raise StorageError(f"simulated: the answer to {name} {key} was lost")
        if fault is Fault.KILL_AFTER:
            raise Killed
        return result

    def _get(self, key: str) -> bytes:
        if key not in self.objects.found:
            raise FileNotFoundError(key)
        return self.objects.found[key]

    def read(self, key: str) -> bytes:
        return self._call("read", key, lambda: self._get(key))

    def open(self, key: str, *, sequential: bool = False) -> IO[bytes]:
        del sequential
        return io.BytesIO(self._call("open", key, lambda: self._get(key)))

    def info(self, key: str) -> FileInfo:
        def look() -> FileInfo:
            self._get(key)
            return self.objects.info(key)

        return self._call("info", key, look)

    def list(self, prefix: str = "") -> Iterator[FileInfo]:
        return iter(self._call("list", prefix, lambda: self.objects.under(prefix)))

    def put(self, key: str, data: bytes) -> None:
        self._call("put", key, lambda: self.objects.set(key, data))

    def put_file(self, key: str, path: Path) -> None:
        self.put(key, path.read_bytes())

    def take_file(self, key: str, path: Path) -> None:
        self.put_file(key, path)
        path.unlink()

    def create(self, key: str, data: bytes) -> bool:
        """Put an object if there is none, as S3 does with If-None-Match.

        Returns:
            Whether the last answer was 200: a 412 after a lost answer may be that to our own put.
        """

        def effect() -> bool:
            if key in self.objects.found:
                return False
            self.objects.set(key, data)
            return True

        return self._call("create", key, effect)

    def claim(self, key: str, data: bytes) -> bytes:
        # As S3Store does: what is there decides, not what the store answered.
        failure: StorageError | None = None
        try:
            self.create(key, data)
        except StorageError as error:
            failure = error
        try:
            return self.read(key)
        except FileNotFoundError:
            gone = f"{key}: created, then not found"
            # Of a driver that slept for long in its probe of the store, `gc` takes the key.
            passing = key.startswith("_quantbatch/probe/")
            raise failure or (StorageError(gone) if passing else AssertionError(gone)) from failure

    def delete(self, key: str) -> None:
        self._call("delete", key, lambda: self.objects.remove(key))
