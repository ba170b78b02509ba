"""Damaged files and bombs: a reason that names the file, or the rows; no crash, and no hang.

QUANTBATCH_TEST_FLIPS=5000 damages more files, QUANTBATCH_TEST_SEED=... others.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import multiprocessing
import os
import random
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quantbatch.errors import InputError
from quantbatch.input import parquetfiles, sources, textfiles
from quantbatch.input.listing import list_input
from quantbatch.records import Slice
from quantbatch.spec import Input

if TYPE_CHECKING:
    from tests.conftest import Count

FLIPS = int(os.environ.get("QUANTBATCH_TEST_FLIPS", "200"))
SEED = int(os.environ.get("QUANTBATCH_TEST_SEED", "6"))
ROWS, ROWS_EACH = 600, 150
AT_ONCE = 25
MOST_S = 60
WRITERS: list[dict[str, Any]] = [
    {
        "compression": codec,
        "use_dictionary": coded,
        "row_group_size": group,
        "data_page_version": page,
    }
    for codec in ("none", "snappy", "zstd", "gzip")
    for coded, group, page in ((True, 200, "1.0"), (False, 5000, "2.0"))
]


def table() -> pa.Table:
    return pa.table(
        {
            "id": list(range(ROWS)),
            "text": [f"row {i} says {'hello ' * (i % 7)}" for i in range(ROWS)],
            "kind": pa.array([["a", "b", None][i % 3] for i in range(ROWS)]).dictionary_encode(),
            "tags": [[f"t{j}" for j in range(i % 4)] for i in range(ROWS)],
            "meta": [{"a": i, "b": [{"c": str(i)}]} for i in range(ROWS)],
        }
    )


def written(seed: int) -> bytes:
    return _written(seed // 2 % len(WRITERS), seed % 2 == 0)


@functools.cache
def _written(writer: int, checksums: bool) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table(), buffer, write_page_checksum=checksums, **WRITERS[writer])
    return buffer.getvalue()


def damaged(whole: bytes, seed: int) -> bytes:
    """Return a file with bytes flipped; in one of four cases where the footer is."""
    rng = random.Random(f"{SEED}:{seed}")
    data = bytearray(whole)
    first = max(0, len(data) - 3000) if seed % 4 == 0 else 0
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        data[rng.randrange(first, len(data))] ^= rng.randrange(1, 256)
    return bytes(data)


def read(folder: Path, data: bytes, name: str = "x.parquet") -> tuple[str, list[dict[str, Any]]]:
    """Read a file as a job does, and say what became of it.

    Raises:
        InputError: It is not even planned.
    """
    (folder / name).write_bytes(data)
    spec = Input(uri=str(folder / name))
    listed = list_input(spec)
    (file,) = listed.files
    facts = sources.inspect(listed.store, file, spec)
    schema = sources.unify_schemas([(file, facts.schema)])
    rows: list[dict[str, Any]] = []
    lost = 0
    for first in range(0, facts.rows, ROWS_EACH):
        count = min(ROWS_EACH, facts.rows - first)
        piece = Slice(name, first, count, etag=file.etag, size=file.size)
        try:
            found = sources.read_slice(listed.store, piece, spec, schema)
        except InputError as error:
            lost += count if name in error.problem else count + ROWS
        else:
            assert found.table.num_rows == count
            rows += found.table.to_pylist()
    assert len(rows) + lost == facts.rows
    return ("rows lost" if lost else "read"), rows


def outcomes(folder: str, seeds: list[int]) -> Counter[str]:
    """Damage and read some files; in a process of its own, which may end with them."""
    found: Counter[str] = Counter()
    wanted = {json.dumps(row) for row in table().to_pylist()}
    for seed in seeds:
        whole = written(seed)
        try:
            what, rows = read(Path(folder), damaged(whole, seed))
        except InputError as error:
            told = "x.parquet: " in error.problem and len(error.problem) > len("x.parquet: ") + 10
            found["refused" if told else f"refused without a reason: {error.problem}"] += 1
        else:
            found[what] += 1
            sums = "with checksums" if seed % 2 == 0 else "without"
            found[f"other values {sums}"] += any(
                json.dumps(row, default=str) not in wanted for row in rows
            )
    return found


@pytest.mark.timeout(600)
def test_a_damaged_parquet_file_gives_its_rows_or_a_reason(tmp_path: Path, count: Count) -> None:
    batches = [list(range(n, min(n + AT_ONCE, FLIPS))) for n in range(0, FLIPS, AT_ONCE)]
    total: Counter[str] = Counter()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for batch in batches:
            # A crash of pyarrow breaks the pool, a hang the time limit.
            total += pool.submit(outcomes, str(tmp_path), batch).result(MOST_S + len(batch))
    count(f"flips={FLIPS} seed={SEED} crashes=0 hangs=0 {dict(total)}")
    assert total["refused"] + total["rows lost"] + total["read"] == FLIPS
    # What a flip does to a page without a checksum is not to be seen; with one it is.
    assert total["other values with checksums"] <= total["other values without"] / 4


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("x.parquet", b"", "is empty (0 bytes)"),
        ("x.parquet", b"PAR1", "x.parquet: can't be read"),
        ("x.parquet", b"PAR1" + b"\xff" * 100 + b"PAR1", "x.parquet: can't be read"),
        ("x.parquet", b"not parquet at all, but long enough to be one", "x.parquet: can't be read"),
        ("x.parquet", written(0)[:-1], "x.parquet: can't be read"),
        ("x.parquet", written(0)[: len(written(0)) // 2], "x.parquet: can't be read"),
        ("x.jsonl", written(0), "is a Parquet file"),
        ("x.jsonl.gz", b"\x1f\x8b\x08nonsense", "x.jsonl.gz: can't be read"),
        ("x.jsonl.gz", gzip.compress(b"{}\n" * 100, mtime=0)[:-20], "x.jsonl.gz: can't be read"),
        ("x.jsonl.zst", b"(\xb5/\xfdnonsense", "x.jsonl.zst: can't be read"),
        ("x.csv", ",".join(f"c{n}" for n in range(10_001)).encode(), "has 10,001 columns; at most"),
        ("x.jsonl", json.dumps({f"c{n}": n for n in range(10_001)}).encode(), "has 10,001 columns"),
    ],
    ids=range(12),
)
def test_what_is_no_file_of_rows(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, data, name)
    assert said in caught.value.problem


def test_a_parquet_file_of_many_columns_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({f"c{n}": pa.array([n]) for n in range(10_001)}), buffer)
    with pytest.raises(InputError, match="has 10,001 columns; at most 10,000"):
        read(tmp_path, buffer.getvalue())


def test_a_footer_that_claims_rows_without_end_is_refused(tmp_path: Path) -> None:
    """A varint in the footer, and planning would make a billion chunks."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"a": pa.nulls(300)}), buffer)
    whole = buffer.getvalue()
    rows = b"\xd8\x04"  # 300, as zigzag and varint
    footer = whole.rindex(rows)
    claimed = whole[:footer] + b"\xff\xff" + whole[footer + 2 :]
    with pytest.raises(InputError, match=r"x\.parquet: "):
        read(tmp_path, claimed)
    data = pq.read_metadata(io.BytesIO(whole))
    assert data.num_rows == 300


def test_a_column_that_expands_a_thousandfold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    text = pa.table({"text": ["a" * 100_000] * 100})
    pq.write_table(text, buffer, compression="zstd", use_dictionary=False)
    assert read(tmp_path, buffer.getvalue())[0] == "read"
    monkeypatch.setattr(parquetfiles, "MAX_EXPANDED_BYTES", 1 << 20)
    with pytest.raises(InputError, match=r"its column text expands from [\d,]+ bytes to 10,0"):
        read(tmp_path, buffer.getvalue())


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_bomb_of_text_is_refused_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setattr(textfiles, "MAX_EXPANDED_BYTES", 1 << 20)
    lines = (b'{"a": "' + b"x" * 10_000 + b'"}\n') * 3_000
    data = gzip.compress(lines) if ending == "gz" else pa.compress(lines, "zstd", asbytes=True)
    assert len(lines) > 200 * len(data)
    with pytest.raises(
        InputError, match=f"x.jsonl.{ending}: its [0-9,]+ bytes expand to more than"
    ):
        read(tmp_path, data, f"x.jsonl.{ending}")
    honest = b'{"a": "hello"}\n' * 100
    data = gzip.compress(honest) if ending == "gz" else pa.compress(honest, "zstd", asbytes=True)
    assert read(tmp_path, data, f"x.jsonl.{ending}")[0] == "read"


def test_one_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(textfiles, "MAX_RECORD_BYTES", 1 << 20)
    for name in ("x.jsonl", "x.csv"):
        with pytest.raises(InputError, match="line 1 is longer than 1,048,576 bytes"):
            read(tmp_path, b"a" * (1 << 21), name)


def test_deep_and_wide_json_is_a_row_or_its_error(tmp_path: Path) -> None:
    deep = 200_000
    lines = [
        b'{"a": ' + b"[" * deep + b"]" * deep + b"}",
        b'{"a": ' * deep + b"1" + b"}" * deep,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": {' + b", ".join(b'"k%d": 1' % n for n in range(20_000)) + b"}}",
        b'{"a": "ok"}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    spec = Input(uri=str(tmp_path / "x.jsonl"))
    listed = list_input(spec)
    (file,) = listed.files
    began = time.process_time()
    facts = sources.inspect(listed.store, file, spec)
    schema = sources.unify_schemas([(file, facts.schema)])
    assert str(schema.field("a").type) == "string"
    found = sources.read_slice(listed.store, Slice("x.jsonl", 0, 5, size=file.size), spec, schema)
    assert {row: error.kind for row, error in found.errors.items()} == dict.fromkeys(
        range(3), "bad_json"
    )
    assert found.table["a"][4].as_py() == "ok"
    assert time.process_time() - began < 5
