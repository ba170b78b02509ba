"""A reader that looks at outputs all the while: visible files must be whole, and never change."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

import boto3
import pyarrow as pa
import pyarrow.parquet as pq

from tests.integration.support import ROWS, ROWS_PER_PART

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class View(Protocol):
    """An output as its readers see it."""

    @property
    def pause_s(self) -> float:
        """Time between two looks."""
        ...

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Yield names and contents of the visible Parquet files."""
        ...


class Folder(NamedTuple):
    """An output on a local disk."""

    path: Path
    pause_s: float = 0.03

    def files(self) -> Iterator[tuple[str, bytes]]:
        for path in self.path.glob("*.parquet"):
            yield str(path), path.read_bytes()


class Prefix(NamedTuple):
    """An output on S3."""

    endpoint: str
    bucket: str
    prefix: str
    pause_s: float = 0.3

    def files(self) -> Iterator[tuple[str, bytes]]:
        s3 = _client(self.endpoint)
        found = s3.list_objects_v2(Bucket=self.bucket, Prefix=f"{self.prefix}/", Delimiter="/")
        for item in found.get("Contents", []):
            if item["Key"].endswith(".parquet"):
                yield item["Key"], s3.get_object(Bucket=self.bucket, Key=item["Key"])["Body"].read()


_clients = threading.local()


def _client(endpoint: str) -> boto3.client:
    if not hasattr(_clients, endpoint):
        setattr(_clients, endpoint, boto3.client("s3", endpoint_url=endpoint))
    return getattr(_clients, endpoint)


@dataclass
class Watcher:
    """Reads every visible file of some outputs again and again."""

    views: dict[str, View] = field(default_factory=dict)
    """The output that is watched now, by the name of who works on it."""
    looks: dict[str, int] = field(default_factory=dict)
    """Files that were read, by kind of output."""
    wrong: list[str] = field(default_factory=list)
    seen: dict[str, bytes] = field(default_factory=dict)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        stop = threading.Event()
        threads = [
            threading.Thread(target=self._watch, args=(kind, stop), name=f"watch {kind.__name__}")
            for kind in (Folder, Prefix)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _watch(self, kind: type, stop: threading.Event) -> None:
        while not stop.is_set():
            views = [view for view in list(self.views.values()) if isinstance(view, kind)]
            for view in views:
                for name, data in view.files():
                    self.looks[kind.__name__] = self.looks.get(kind.__name__, 0) + 1
                    self._look(name, data)
            time.sleep(min((view.pause_s for view in views), default=0.05))

    def _look(self, name: str, data: bytes) -> None:
        if self.seen.get(name) == data:
            return
        try:
            rows = pq.read_table(pa.BufferReader(data)).num_rows
        except (pa.ArrowInvalid, OSError) as error:
            self.wrong.append(f"{name}: {error}")
            return
        last = name.endswith(f"part-{(ROWS - 1) // ROWS_PER_PART:06d}.parquet")
        whole = ROWS % ROWS_PER_PART if last else ROWS_PER_PART
        if name in self.seen or rows != whole:
            self.wrong.append(f"{name}: {rows} of {whole} rows, seen before: {name in self.seen}")
        self.seen[name] = data
