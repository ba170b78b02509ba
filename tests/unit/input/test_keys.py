"""Every key of the user's key column, once."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from quantbatch.errors import InputError
from quantbatch.input import keys, sources
from quantbatch.input.keys import KeyBatch, check_unique, refuse_duplicates
from quantbatch.input.listing import list_input
from quantbatch.records import Chunk, Slice
from quantbatch.spec import Input


def batches(*files: Sequence[object], size: int = 100) -> Callable[[], list[KeyBatch]]:
    made = []
    for number, values in enumerate(files):
        for at in range(0, len(values), size):
            part = pa.array(values[at : at + size])
            made.append(KeyBatch(f"{number}.csv", np.arange(at, at + len(part)), part))
    return lambda: made


def refusal(given: Callable[[], list[KeyBatch]], keys_in_memory: int = 1000) -> str:
    with pytest.raises(InputError) as caught:
        refuse_duplicates("id", given, keys_in_memory=keys_in_memory)
    return caught.value.problem


@pytest.mark.parametrize("keys_in_memory", [1, 150, 10_000])
@pytest.mark.parametrize("kind", [str, int])
def test_unique_keys_pass(keys_in_memory: int, kind: type) -> None:
    values = [kind(number) for number in range(2000)]
    given = batches(values[:1000], values[1000:])
    refuse_duplicates("id", given, keys_in_memory=keys_in_memory)


@pytest.mark.parametrize("keys_in_memory", [1, 150, 10_000])
def test_a_duplicate_is_named_with_both_rows(keys_in_memory: int) -> None:
    values = [f"key {number}" for number in range(3000)]
    values[2709] = values[3]
    found = refusal(batches(values[:1000], values[1000:]), keys_in_memory)
    assert found == "duplicate key 'key 3' in column id: 0.csv:3 and 1.csv:1709"


def test_many_duplicates() -> None:
    assert refusal(batches(["x"] * 5000)) == "duplicate key 'x' in column id: 0.csv:0 and 0.csv:1"


@pytest.mark.parametrize("keys_in_memory", [1, 10_000])
def test_keys_that_share_a_hash_are_compared(
    monkeypatch: pytest.MonkeyPatch, keys_in_memory: int
) -> None:
    def weak(texts: list[str]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        return np.array([len(text) for text in texts], np.uint64)

    monkeypatch.setattr(keys, "_hashes", weak)
    refuse_duplicates("id", batches(["ab", "cd", "ef"]), keys_in_memory=keys_in_memory)
    assert "duplicate key 'cd'" in refusal(batches(["ab", "cd", "cd"]), keys_in_memory)


def test_a_missing_key_is_named() -> None:
    assert (
        refusal(batches(["a"] * 0, ["a", None, "b"])) == "the key in column id is missing: 1.csv:1"
    )


def test_a_column_that_can_be_no_key() -> None:
    assert "column id is list<item: int64> and can't be a key" in refusal(batches([[1], [2]]))


def test_no_rows() -> None:
    refuse_duplicates("id", batches())


def test_random_keys_are_found_as_a_set_finds_them() -> None:
    chance = random.Random(7)
    for _ in range(20):
        values = [chance.randrange(4000) for _ in range(chance.randrange(1, 100))]
        given = batches(values, size=7)
        if len(set(values)) < len(values):
            assert "duplicate key" in refusal(given, keys_in_memory=10)
        else:
            refuse_duplicates("id", given, keys_in_memory=10)


class FewSlices:
    """What `check_unique` needs of a plan."""

    def __init__(self, schema: pa.Schema, pieces: list[Slice]) -> None:
        self.schema = schema
        self._pieces = pieces

    def each_chunk(self) -> list[Chunk]:
        return [Chunk(i, 0, (piece,)) for i, piece in enumerate(self._pieces)]


def check_files(folder: Path, rows_per_chunk: int = 2) -> None:
    check_input(Input(uri=str(folder), key="id"), rows_per_chunk)


def check_input(spec: Input, rows_per_chunk: int) -> None:
    listed = list_input(spec)
    facts = [(file, sources.inspect(listed.store, file, spec)) for file in listed.files]
    schema = sources.unify_schemas([(file, found.schema) for file, found in facts])
    pieces = [
        Slice(file.name, at, min(rows_per_chunk, found.rows - at), size=file.size, etag=file.etag)
        for file, found in facts
        for at in range(0, found.rows, rows_per_chunk)
    ]
    check_unique(listed.store, FewSlices(schema, pieces), spec)  # type: ignore[arg-type]


def test_the_remedy_is_one_that_the_format_has(tmp_path: Path) -> None:
    line = '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}\n'
    (tmp_path / "a.jsonl").write_text(2 * line)
    for form, remedy in (("auto", "leave out input.key"), ("openai-batch", "custom_id of its own")):
        spec = Input.model_validate({"uri": str(tmp_path), "key": "custom_id", "format": form})
        with pytest.raises(InputError, match="duplicate key 'a'") as caught:
            check_input(spec, rows_per_chunk=2)
        assert remedy in (caught.value.hint or "")


def test_files(tmp_path: Path) -> None:
    (tmp_path / "day=1").mkdir()
    (tmp_path / "day=1" / "a.jsonl").write_text('{"id": 1}\n{"id": 2}\n{"id": 3}\n')
    (tmp_path / "b.jsonl").write_text('{"id": 4}\n\n{"id": 5}\n')
    check_files(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"id": 4}\n\n{"id": 3}\n')
    with pytest.raises(InputError, match=r"duplicate key '3' in column id: b\.jsonl:1 and day=1/a"):
        check_files(tmp_path)


def test_rows_that_can_not_be_read_have_no_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1}\nbroken\n{"id": 2}\nbroken\n{"id": null}')
    with pytest.raises(InputError, match=r"the key in column id is missing: a\.jsonl:4"):
        check_files(tmp_path)


def test_slices_are_joined_for_reading() -> None:
    pieces = [Slice("a", at, 100) for at in range(0, 1000, 100)] + [Slice("b", 0, 100)]
    joined = list(keys._joined([*pieces, Slice("b", 300, 10)]))
    assert [(p.file, p.first_row, p.rows) for p in joined] == [
        ("a", 0, 1000),
        ("b", 0, 100),
        ("b", 300, 10),
    ]
