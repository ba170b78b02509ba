"""Many small files of answers become a few large ones, at the end of a job.

A pack is put whole, and its footer names the files whose answers it holds; nothing else says so,
hence nothing can contradict it. Two jobs that pack the same files at the same time both put a
pack: some answers are then there twice. The packed files are removed by a later job, a day after
the pack was made: by then every reader has looked again, and one that has not finds a file gone,
which is a miss.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from quantbatch.answers import tables
from quantbatch.answers.cache import PACK, TIME, new_name, packed_in
from quantbatch.errors import StorageError
from quantbatch.reread import Unreadable, open_parquet
from quantbatch.storage import scratch_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from quantbatch.answers.cache import Space
    from quantbatch.storage import FileInfo, Store

logger = logging.getLogger(__name__)

FILES_WORTH_IT = 64
"""Small files that are left as they are: a replica reads their keys in about a second from S3."""
PACK_BYTES = 128 << 20
KEPT_FOR = timedelta(days=1)
"""How long a packed file stays."""


def tidy(space: Space) -> None:
    """Pack small files if there are many, and remove those packed long ago; of a job that is done,
    remove its own. Trouble is logged.
    """
    try:
        if space.is_of_job:
            for info in list(space.store.list(space.under)):
                space.store.delete(info.key)
        else:
            _tidy(space.store, space.folder)
    except StorageError as error:
        logger.warning("%s can't be tidied up: %s", space.name, error)


def _tidy(store: Store, folder: str) -> None:
    listed = {info.key.rpartition("/")[2]: info for info in store.list(folder)}
    packed: set[str] = set()
    for name in [name for name in listed if name.endswith(PACK)]:
        names = _packed(store, f"{folder}/{name}")
        packed |= names
        if _made(name) < datetime.now(UTC) - KEPT_FOR:
            for gone in names & listed.keys():
                store.delete(f"{folder}/{gone}")
    small = [
        info
        for name, info in sorted(listed.items())
        if name.endswith(".parquet") and not name.endswith(PACK) and name not in packed
    ]
    if len(small) > FILES_WORTH_IT:
        for files in _divided(small):
            _pack(store, folder, files)


def _packed(store: Store, key: str) -> set[str]:
    try:
        with open_parquet(store, key) as file:
            return set(packed_in(file))
    except Unreadable:
        return set()  # readers do without it, too


def _made(name: str) -> datetime:
    try:
        return datetime.strptime(name.split("-")[0], TIME).replace(tzinfo=UTC)
    except ValueError:
        return datetime.now(UTC)


def _divided(files: Sequence[FileInfo]) -> Iterable[list[FileInfo]]:
    """Yield files in groups of about the size of a pack, in the order of their times."""
    group: list[FileInfo] = []
    for file in files:
        group.append(file)
        if sum(info.size for info in group) >= PACK_BYTES:
            yield group
            group = []
    if group:
        yield group


def _pack(store: Store, folder: str, files: Sequence[FileInfo]) -> None:
    """Put a pack of the answers of some files; one that is damaged is left out of it."""
    sound = [info for info in files if _is_sound(store, info.key)]
    names = [info.key.rpartition("/")[2] for info in sound]
    schema = tables.SCHEMA.with_metadata({"quantbatch": json.dumps({"packs": names})})
    with scratch_file() as path:
        options = {"compression": "zstd", "write_page_checksum": True}
        with pq.ParquetWriter(path, schema, **options) as writer:
            for info in sound:
                with open_parquet(store, info.key) as file:
                    for group in range(file.metadata.num_row_groups):
                        writer.write_table(file.read_row_group(group).cast(schema))
        store.put_file(f"{folder}/{new_name()}{PACK}", path)


def _is_sound(store: Store, key: str) -> bool:
    try:
        with open_parquet(store, key) as file:
            same: bool = file.schema_arrow.equals(tables.SCHEMA)
            for group in range(file.metadata.num_row_groups):
                file.read_row_group(group)
            return same
    except (Unreadable, pa.ArrowException):
        return False
