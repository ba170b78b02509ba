"""Prompts that are rendered a second time: the same, or told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quantbatch import rows, stages
from quantbatch.spec import JobSpec
from quantbatch.verify import verify
from tests.unit.batchfile.test_outputs import MODEL, run_here

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def fresh_renderers() -> Iterator[None]:
    stages._renderer.cache_clear()
    yield
    stages._renderer.cache_clear()


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    """A finished job of 10 rows in 3 chunks: one prompt is null, one too long."""
    (tmp_path / "in").mkdir()
    shutil.copytree(MODEL, tmp_path / "model")
    texts = [f"row {n} says hello" for n in range(8)] + [None, "far too long " * 200]
    pq.write_table(pa.table({"text": texts}), tmp_path / "in" / "a.parquet")
    spec = JobSpec.model_validate(
        {
            "name": "prompts",
            "input": {"uri": str(tmp_path / "in"), "rows_per_chunk": 4},
            "model": {"id": str(tmp_path / "model"), "bits": 16},
            "prompt": {"template": "{{ text }}"},
            "engine": {"kind": "echo", "max_input_tokens": 100},
            "sampling": {"max_new_tokens": 8},
            "output": {"uri": str(tmp_path / "out")},
        }
    )
    run_here(spec)
    return spec


def test_prompts_are_rendered_the_same(spec: JobSpec) -> None:
    verdict = verify(spec, prompts=True)
    assert (verdict.outcome, verdict.problems, verdict.prompts_same) == ("proven", (), 10)
    assert verify(spec).prompts_same is None


def test_another_digest_is_told(spec: JobSpec) -> None:
    path = Path(spec.output.uri, "_quantbatch/commits/00000001.json")
    record = json.loads(path.read_text())
    assert len(record["prompts"]) == 64
    path.write_text(json.dumps(record | {"prompts": "0" * 64}))
    verdict = verify(spec, prompts=True)
    ((problem),) = verdict.problems
    assert problem.kind == "prompts that are others now"
    assert problem.examples == ("among a.parquet:4 to a.parquet:7",)
    assert (verdict.exit_code, verdict.prompts_same) == (1, 6)
    assert verify(spec).exit_code == 0


def test_another_tokenizer_is_told(spec: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a worker where a library is another version: here a word has another token."""
    render = rows.prompts_digest
    monkeypatch.setattr(
        rows, "prompts_digest", lambda ids: render(pa.array([[7], *ids.to_pylist()[1:]], ids.type))
    )
    verdict = verify(spec, prompts=True)
    assert [(p.kind, p.count) for p in verdict.problems] == [("prompts that are others now", 3)]


def test_records_without_digests_are_passed_over(spec: JobSpec) -> None:
    for path in Path(spec.output.uri, "_quantbatch/commits").iterdir():
        record = json.loads(path.read_text())
        del record["prompts"]
        path.write_text(json.dumps(record))
    verdict = verify(spec, prompts=True)
    assert (verdict.outcome, verdict.prompts_same) == ("proven", 0)


def digest(*prompts: list[int] | None) -> str:
    return rows.prompts_digest(pa.array(prompts, pa.list_(pa.int32())))


def test_digests_tell_apart_what_differs() -> None:
    different = [
        digest(),
        digest(None),
        digest([]),
        digest([1]),
        digest([1, 2]),
        digest([1], [2]),
        digest([2], [1]),
        digest(None, [1]),
        digest([1], None),
        digest([], [1]),
    ]
    assert len(set(different)) == len(different)


def test_a_slice_has_its_own_digest() -> None:
    prompts = pa.array([[1], None, [2, 3], [4]], pa.list_(pa.int32()))
    assert rows.prompts_digest(prompts.slice(1, 2)) == digest(None, [2, 3])
    assert rows.prompts_digest(prompts.take(pa.array([3, 0]))) == digest([4], [1])
