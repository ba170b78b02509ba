"""Nothing is written or removed outside the output, whatever folders and records are called."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from quantbatch.checks import check_folders
from quantbatch.errors import InputError, StorageError
from quantbatch.input.listing import InputFile, list_input, partition_of
from quantbatch.plan import Shard
from quantbatch.spec import Input, Storage
from quantbatch.storage import LocalStore, S3Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Count

PIECES = [
    "..", ".", "", "/", "//", "\\", "..\\", "~", "~root", "%2e%2e", "%2e%2e%2f", "%00", "\0", "\n", "\r\n",
     "a", "day=1", "day=..", "day=../..", "day=/etc", "day=%2e%2e%2f", "..=1", "k=" + "x" * 5000, "=", "s3:",
     "s3://other-bucket/x", "file:///etc", "\u202e", "\u2024\u2024", "\ud800", "link", "loop", "CON", "a b", "$(x)", "*",
]  # fmt: skip
EXAMPLES = 2000
SEED = 6


def names() -> Iterator[str]:
    """Yield names that no good comes of."""
    rng = random.Random(SEED)
    for _ in range(EXAMPLES):
        pieces = [rng.choice(PIECES) for _ in range(rng.randrange(1, 7))]
        if rng.random() < 0.3:
            pieces.append("".join(map(chr, rng.sample(range(0xD7FF), 5))))
        yield "/".join(pieces)


def everything(folder: Path) -> set[tuple[str, int]]:
    """Return all names below a folder but those in `out`, with their sizes."""
    found = set()
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if Path(place, name) != folder / "out"]
        found |= {
            (f"{place}/{name}", os.lstat(f"{place}/{name}").st_size) for name in files + folders
        }
    return found


@pytest.fixture
def output(tmp_path: Path) -> LocalStore:
    """An output with neighbours, and with links to them in it."""
    for name in ("out/a", "elsewhere/day=1", "outer"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("secret", "elsewhere/part-000000.parquet", "outer/b"):
        (tmp_path / name).write_text("untouched")
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "out" / "a" / "link").symlink_to("../../outer")
    (tmp_path / "out" / "loop").symlink_to("../secret")
    return LocalStore(str(tmp_path / "out"))


def test_nothing_outside_is_touched(output: LocalStore, tmp_path: Path, count: Count) -> None:
    before = everything(tmp_path)
    source = tmp_path / "out" / "source"
    tally = {"written": 0, "refused": 0}

    for number, key in enumerate(names()):
        source.write_bytes(b"x")
        try:
            match number % 5:
                case 0:
                    output.put(key, b"x")
                case 1:
                    output.claim(key, b"x")
                case 2:
                    output.put_file(key, source)
                case 3:
                    output.take_file(key, source)
                case _:
                    output.delete(key)
            tally["written"] += 1
        except (StorageError, UnicodeEncodeError, FileNotFoundError):
            tally["refused"] += 1
    assert everything(tmp_path) == before
    assert min(tally.values()) > EXAMPLES / 20
    count(f"keys={sum(tally.values())} {tally} outside=0")


def test_a_name_of_the_input_stays_in_the_output(
    output: LocalStore, tmp_path: Path, count: Count
) -> None:
    """Folders such as day=1 go from the names of input files, of S3 perhaps, to keys of the output."""
    before = everything(tmp_path)
    tally = {"written": 0, "refused": 0}

    for name in names():
        try:
            file = InputFile(f"{name}/x.parquet", 1, "", partition_of(f"{name}/x.parquet"))
            check_folders(output, [file.folder])
            output.put(Shard(0, file.folder, 0, 1, 1).key, b"x")
            tally["written"] += 1
        except (InputError, StorageError, UnicodeEncodeError):
            tally["refused"] += 1
    assert everything(tmp_path) == before
    count(f"names={sum(tally.values())} {tally} outside=0")


@pytest.mark.parametrize("key", ["../secret", "/etc/passwd", "a/../../secret", "a\0b"])
def test_what_is_outside_is_not_read(output: LocalStore, key: str) -> None:
    for read in (output.read, output.open, output.info, lambda k: [*output.list(k)]):
        with pytest.raises(StorageError, match="names nothing that can be in it"):
            read(key)


def test_a_link_out_of_the_output_is_named(output: LocalStore, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="link: a link in it leads out of") as caught:
        output.put("link/part-000000.parquet", b"x")
    assert "the whole output may be a link" in caught.value.hint
    with pytest.raises(StorageError, match="leads out of"):
        output.delete("link/part-000000.parquet")
    (tmp_path / "alias").symlink_to(tmp_path / "out")
    LocalStore(str(tmp_path / "alias")).put("a/b", b"x")
    assert (tmp_path / "out" / "a" / "b").read_bytes() == b"x"
    output.put("loop", b"x")  # the link itself is replaced
    assert (tmp_path / "secret").read_text() == "untouched"


def test_a_link_to_a_folder_around_it_is_named_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "x.jsonl").write_text("{}\n")
    (tmp_path / "in" / "a" / "up").symlink_to("..")
    with pytest.raises(StorageError, match="a link to a folder that it lies in"):
        list_input(Input(uri=str(tmp_path / "in")))


def test_a_folder_that_the_output_can_t_have_is_refused_before_any_row_is_answered() -> None:
    local, s3 = LocalStore("/out"), S3Store("s3://bucket/out", Storage())
    for folder in ("day=" + "x" * 252, "a=\0", "/".join(["a=" + "b" * 200] * 21)):
        with pytest.raises(InputError, match="can't be one of the output /out"):
            check_folders(local, ["day=1", folder])
    check_folders(s3, ["day=" + "x" * 252, "day=é"])
    with pytest.raises(InputError, match="can't be one of the output s3://bucket/out: S3 takes no"):
        check_folders(s3, ["a=" + "x" * 1024])
