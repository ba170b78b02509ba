"""Is the user's key column a key? Checked once, when input is planned, in bounded memory.

Each key becomes the 64-bit hash that Python gives its text (SipHash with a key of this process:
nobody can prepare input that collides). Hashes that occur twice are found by sorting, beyond a few
million keys bucket by bucket on the local disk. Different keys may share a hash (a hundred million
keys have such a pair once in some 3,700 jobs), so those that do are read again and compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from quantbatch.batchfile.specs import BATCH_FILE
from quantbatch.errors import InputError, StorageError
from quantbatch.input.listing import partition_of
from quantbatch.input.sources import read_slice

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from quantbatch.plan import Plan
    from quantbatch.records import Slice
    from quantbatch.spec import Input
    from quantbatch.storage import Store

KEYS_IN_MEMORY = 1 << 23
"""Keys whose hashes are held in memory: 64 MiB, and as much again for sorting them."""
NO_KEY = "remove one of the rows, or leave out input.key"
_BUCKETS = 256
_ROWS_AT_ONCE = 1 << 14
_MAX_SUSPECTS = 1 << 20
"""Shared hashes that are looked at again. A job with this many by chance has
6 * 10**12 keys."""


class KeyBatch(NamedTuple):
    """Keys of some rows of a file."""

    file: str
    rows: NDArray[np.int64]
    """Row numbers in the file."""
    keys: pa.Array


def check_unique(store: Store, plan: Plan, input: Input) -> None:
    """Refuse a key column in which a value is missing or occurs twice.

    Rows that can't be read have no key and are passed over. Reads the column twice if there is a
    pair to look at, else once.

    Raises:
        InputError: There is such a value; the message names it and its rows.
    """
    assert input.key is not None, "there is a key to check"
    hint = "give each request a custom_id of its own" if input.format == BATCH_FILE else NO_KEY
    refuse_duplicates(input.key, lambda: _key_batches(store, plan, input), hint=hint)


def _key_batches(store: Store, plan: Plan, input: Input) -> Iterator[KeyBatch]:
    assert input.key is not None, "there is a key to read"
    for piece in _joined(piece for chunk in plan.each_chunk() for piece in chunk.slices):
        found = read_slice(
            store, piece, input, plan.schema, partition_of(piece.file), columns=[input.key]
        )
        readable = np.ones(piece.rows, dtype=bool)
        readable[list(found.errors)] = False
        rows = np.arange(piece.first_row, piece.first_row + piece.rows)
        keys = found.table[input.key].combine_chunks()
        yield KeyBatch(piece.file, rows[readable], keys.filter(pa.array(readable)))


def _joined(pieces: Iterable[Slice]) -> Iterator[Slice]:
    """Join slices that follow each other in a file: each one that is read asks for the file's
    version, a round trip on S3.
    """
    before: Slice | None = None
    for piece in pieces:
        if before and _follows(piece, before):
            before = replace(before, rows=before.rows + piece.rows)
            continue
        if before:
            yield before
        before = piece
    if before:
        yield before


def _follows(piece: Slice, before: Slice) -> bool:
    return (
        piece.file == before.file
        and piece.first_row == before.first_row + before.rows
        and before.rows + piece.rows <= _ROWS_AT_ONCE
    )


def refuse_duplicates(
    column: str,
    batches: Callable[[], Iterable[KeyBatch]],
    *,
    keys_in_memory: int = KEYS_IN_MEMORY,
    hint: str = NO_KEY,
) -> None:
    """Refuse keys of which one is null or occurs twice.

    Args:
        column: Name of the key column.
        batches: Gives all keys, the same ones each time that it is called.
        keys_in_memory: Keys beyond which hashes go to the local disk.
        hint: What to do about a key that occurs twice.

    Raises:
        InputError: There is such a key; of several, the one whose second row comes first among
            those looked at.
    """
    suspects = _shared_hashes(column, batches(), keys_in_memory)
    if not len(suspects):
        return
    first: dict[str, str] = {}
    for batch in batches():
        texts = key_texts(column, batch)
        for index in np.flatnonzero(np.isin(_hashes(texts), suspects)):
            key, row = texts[index], f"{batch.file}:{batch.rows[index]}"
            if key in first:
                raise InputError(
                    f"duplicate key {key!r} in column {column}: {first[key]} and {row}",
                    hint,
                )
            first[key] = row
    assert len(suspects) < _MAX_SUSPECTS, "a million pairs of keys share their hashes by chance"


def key_texts(column: str, batch: KeyBatch) -> list[str]:
    """Return keys as they stand in `row_id`.

    Raises:
        InputError: A key is null, or the column's type is none for keys.
    """
    if batch.keys.null_count:
        row = batch.rows[pc.index(pc.is_null(batch.keys), value=True).as_py()]
        raise InputError(
            f"the key in column {column} is missing: {batch.file}:{row}",
            "fill it, or leave out input.key",
        )
    try:
        texts: list[str] = batch.keys.cast(pa.string()).to_pylist()
    except pa.ArrowException as error:
        raise InputError(
            f"column {column} is {batch.keys.type} and can't be a key",
            "choose a column of strings or integers as input.key",
        ) from error
    return texts


def _hashes(texts: list[str]) -> NDArray[np.uint64]:
    return np.fromiter(map(hash, texts), np.int64, len(texts)).view(np.uint64)


def _shared_hashes(
    column: str, batches: Iterable[KeyBatch], keys_in_memory: int
) -> NDArray[np.uint64]:
    """Return hashes that occur more than once, sorted."""
    held: list[NDArray[np.uint64]] = []
    count = 0
    with tempfile.TemporaryDirectory(prefix="quantbatch-keys-") as folder:
        for batch in batches:
            held.append(_hashes(key_texts(column, batch)))
            count += len(held[-1])
            if count >= keys_in_memory:
                _spill(held, Path(folder))
                held, count = [], 0
        if not any(Path(folder).iterdir()):
            return _repeated(held)
        if held:
            _spill(held, Path(folder))
        buckets = sorted(Path(folder).iterdir())
        found = [_repeated([np.fromfile(bucket, np.uint64)]) for bucket in buckets]
    return np.concatenate(found)[:_MAX_SUSPECTS]


def _spill(held: list[NDArray[np.uint64]], folder: Path) -> None:
    """Append hashes to the files of their buckets, by their highest bits."""
    hashes = np.sort(np.concatenate(held))
    bounds = np.arange(1, _BUCKETS, dtype=np.uint64) << np.uint64(64 - 8)
    try:
        for number, part in enumerate(np.split(hashes, np.searchsorted(hashes, bounds))):
            if not part.size:
                continue
            with (folder / f"{number:03d}").open("ab") as bucket:
                bucket.write(part.tobytes())
    except OSError as error:
        raise StorageError(
            f"{folder}: {error}", "checking the keys needs 8 bytes a row there: set TMPDIR"
        ) from error


def _repeated(held: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    hashes = np.sort(np.concatenate(held)) if held else np.empty(0, np.uint64)
    return np.unique(hashes[1:][hashes[1:] == hashes[:-1]])[:_MAX_SUSPECTS]
