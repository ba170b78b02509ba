"""How long prompts are, from a sample: where it is taken, and what is said of the whole."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantbatch import lengths, storage
from quantbatch.input import listing, sources
from quantbatch.input.parquetfiles import ParquetCursor
from quantbatch.lengths import SAMPLED_ROWS, Lengths, sample_lengths
from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.plan import make_plan
from quantbatch.spec import JobSpec

REPOSITORY = Path(__file__).parents[2]
MODEL = REPOSITORY / "configs" / "quickstart" / "model"


def make_spec(folder: Path, **changes: Any) -> JobSpec:
    fields = {
        "name": "test",
        "input": {"uri": str(folder / "in")},
        "model": {"id": str(MODEL), "bits": 16},
        "prompt": {"template": "{{ text }}", "format": "text"},
        "output": {"uri": str(folder / "out")},
    }
    return JobSpec.model_validate(fields | changes)


def sampled(spec: JobSpec, limit: int = 100) -> Lengths:
    plan = make_plan(spec, listing.list_input(spec.input))
    return sample_lengths(spec, open_checkpoint(spec.model), plan, max_input_tokens=limit)


def write(folder: Path, texts: list[Any], name: str = "a.parquet", **options: Any) -> None:
    (folder / "in").mkdir(exist_ok=True)
    pq.write_table(
        pa.table({"text": pa.array(texts, pa.string())}), folder / "in" / name, **options
    )


def words(count: int) -> str:
    return " ".join(["nice"] * count)


def test_a_small_input_is_counted_whole(tmp_path: Path) -> None:
    write(tmp_path, [words(count) for count in range(1, 41)])
    found = sampled(make_spec(tmp_path))
    assert (found.rows, found.total_rows) == (40, 40)
    assert found.quantile(0.5) == found.tokens[19]
    assert found.quantile(1) == found.tokens[-1] > found.tokens[0]
    assert found.expected(found.rows) == 40
    assert found.unseen_at_most == 0


def test_counts_are_those_of_the_run(tmp_path: Path) -> None:
    from quantbatch.sample import sample

    write(tmp_path, [words(3), words(7) + "!", "", None])
    spec = make_spec(tmp_path, prompt={"template": "Say {{ text }}."})
    rows = sample(spec, 4)
    found = sampled(spec)
    assert list(found.tokens) == sorted(len(row.prompt_ids) for row in rows if not row.error)
    assert sum(found.errors.values()) == sum(row.error is not None for row in rows)


def test_rows_beyond_the_limit_are_counted_also_where_they_are_cut(tmp_path: Path) -> None:
    write(tmp_path, [words(5)] * 30 + [words(5000)] * 10 + [words(200_000)])
    for policy in ("error", "truncate_left"):
        found = sampled(make_spec(tmp_path, engine={"too_long": policy}))
        assert (found.too_long, len(found.tokens), found.errors) == (11, 41, {})
        assert found.usual_long() == 100
        assert found.mean < 100
        assert found.tokens[-1] == lengths.COUNTED_TOKENS + 1


def test_the_sample_is_spread_over_files_and_row_groups(tmp_path: Path) -> None:
    for number in range(4):
        texts = [f"{words(1 + number * 10 + row // 1000)}" for row in range(4000)]
        write(tmp_path, texts, f"{number}.parquet", row_group_size=1000)
    found = sampled(make_spec(tmp_path), limit=400)
    assert found.rows == SAMPLED_ROWS
    assert len(set(found.tokens)) == 16
    assert found.total_rows == 16_000
    assert found.expected(found.rows // 4) == 4000


def test_only_the_first_pages_of_row_groups_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, [words(3)] * 200_000, row_group_size=50_000)
    taken: list[tuple[int, int]] = []
    take = ParquetCursor.take

    def noted(self: ParquetCursor, piece: Any) -> Any:
        taken.append((piece.first_row, piece.rows))
        return take(self, piece)

    monkeypatch.setattr(ParquetCursor, "take", noted)
    assert sampled(make_spec(tmp_path)).rows == SAMPLED_ROWS
    assert taken == [(first, 64) for first in (0, 50_000, 100_000, 150_000)]


@pytest.mark.parametrize("ending", ["jsonl", "csv", "jsonl.gz"])
def test_text_files_are_sampled_at_their_marks(tmp_path: Path, ending: str) -> None:
    (tmp_path / "in").mkdir()
    rows = [words(1 + row // 1024) for row in range(10 * 1024)]
    lines = ["text", *rows] if ending == "csv" else [json.dumps({"text": row}) for row in rows]
    data = "\n".join(lines).encode()
    path = tmp_path / "in" / f"a.{ending}"
    if ending.endswith("gz"):
        data = pa.compress(data, "gzip", asbytes=True)
    path.write_bytes(data)
    found = sampled(make_spec(tmp_path))
    # Compressed text has no places: its beginning stands for it.
    assert len(set(found.tokens)) == (1 if ending.endswith("gz") else 10)
    assert found.rows >= 200
    assert found.total_rows == 10 * 1024


def test_rows_that_can_not_be_read_or_rendered_are_errors_of_their_kind(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    lines = ['{"text": "good"}'] * 6 + ["{", '{"text": ""}', '{"text": null}']
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines))
    found = sampled(make_spec(tmp_path))
    assert len(found.tokens) == 6
    assert found.errors["bad_json"] == 1
    assert sum(found.errors.values()) == 3


def test_a_file_that_went_away_leaves_the_others(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path, [words(3)] * 10, f"{number}.parquet")
    spec = make_spec(tmp_path)
    plan = make_plan(spec, listing.list_input(spec.input))
    (tmp_path / "in" / "1.parquet").unlink()
    found = sample_lengths(spec, open_checkpoint(spec.model), plan, max_input_tokens=100)
    assert found.rows == 20


def test_columns_from_folders_are_there(tmp_path: Path) -> None:
    (tmp_path / "in" / "day=7").mkdir(parents=True)
    write(tmp_path, [words(3)] * 5, "day=7/a.parquet")
    spec = make_spec(tmp_path, prompt={"template": "{{ day }} {{ text }}", "format": "text"})
    assert sampled(spec).rows == 5


def test_rows_near_a_place_are_rows_of_the_file(tmp_path: Path) -> None:
    write(tmp_path, [str(row) for row in range(100)], row_group_size=30)
    spec = make_spec(tmp_path)
    plan = make_plan(spec, listing.list_input(spec.input))
    store = storage.open_store(plan.root, spec.input.storage)
    (piece,) = [row for chunk in plan.each_chunk() for row in chunk.slices][:1]
    pieces = [piece.__class__(piece.file, first, 1, etag=piece.etag, size=piece.size)
              for first in (5, 29, 31, 95)]  # fmt: skip
    found = sources.read_near(store, pieces, spec.input, plan.schema, rows_each=4)
    assert [rows.table["text"].to_pylist() for rows in found] == [
        [str(row) for row in range(8)],
        [str(row) for row in range(30, 34)],
        [str(row) for row in range(90, 94)],
    ]


# ---- what follows for the whole


def test_none_in_a_sample_is_not_none_at_all() -> None:
    found = Lengths((5,) * 300, 100, {}, 1_000_000)
    assert found.too_long == 0
    assert found.unseen_at_most == 10_000
    assert Lengths((), 100, {}, 10).usual_long() == 100


@given(
    tokens=st.lists(st.integers(0, 300), min_size=1, max_size=50),
    limit=st.integers(1, 200),
    errors=st.integers(0, 5),
)
def test_the_laws_of_a_sample(tokens: list[int], limit: int, errors: int) -> None:
    found = Lengths(tuple(sorted(tokens)), limit, {"bad_json": errors}, 1000)
    assert found.quantile(0) == min(tokens)
    assert found.quantile(0.5) <= found.quantile(0.95) <= found.quantile(1) == max(tokens)
    assert sum(count <= found.quantile(0.95) for count in tokens) >= 0.95 * len(tokens)
    assert found.usual_long() <= limit
    assert found.mean <= limit
    assert 0 <= found.expected(found.too_long) <= 1000


def test_a_thousand_files_take_seconds_and_no_torch(tmp_path: Path) -> None:
    """It takes 1.3 s, most of it for importing transformers; the bound leaves room for a busy
    machine.
    """
    for number in range(1000):
        write(tmp_path, [words(3)] * 20, f"{number}.parquet")
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tests.unit.test_lengths import make_spec, sampled\n"
        "began = time.monotonic()\n"
        f"found = sampled(make_spec(Path({str(tmp_path)!r})))\n"
        "print(found.rows, 'torch' in sys.modules)\n"
    )
    began = time.monotonic()
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=120, cwd=REPOSITORY
    )
    assert done.stdout.split() == ["256", "False"]
    assert time.monotonic() - began < 40
