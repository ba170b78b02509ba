"""Which files a URI stands for, and what row ids are relative to."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from quantbatch.errors import InputError
from quantbatch.input.formats import format_of
from quantbatch.input.listing import Listing, input_root, list_input, partition_of, would_list
from quantbatch.spec import Input


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def names(listed: Listing) -> list[str]:
    return [file.name for file in listed.files]


def refusal(uri: str | list[str] | Path, **options: str) -> InputError:
    with pytest.raises(InputError) as caught:
        list_input(
            Input.model_validate({"uri": uri if isinstance(uri, list) else str(uri)} | options)
        )
    return caught.value


@pytest.mark.parametrize(
    ("uri", "root"),
    [
        ("data", "data"),
        ("data/", "data"),
        ("./data//sub/../", "data"),
        (".", "."),
        ("../data", "../data"),
        ("/", "/"),
        ("~/data/x.csv", "~/data"),
        ("file:///srv/data", "/srv/data"),
        ("data/day.parquet", "data"),
        ("data/day.parquet/", "data/day.parquet"),
        ("data/v1.2", "data/v1.2"),
        ("data/.cache", "data/.cache"),
        ("prompts.jsonl.gz", "."),
        ("/x.csv", "/"),
        ("data/*.parquet", "data"),
        ("data/day=2026-*/part-?.parquet", "data"),
        ("data/[ab]/x/y.csv", "data"),
        ("*.csv", "."),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://bucket/a.csv", "s3://bucket"),
        ("s3://bucket/data/", "s3://bucket/data"),
        ("s3://bucket/data/**/*.parquet", "s3://bucket/data"),
        (["data/a", "data/b"], "data"),
        (["data/a", "data/ab"], "data"),
        (["data/a/x.csv", "data/a/b/"], "data/a"),
        (["s3://bucket/a/x.csv", "s3://bucket/b/*.csv"], "s3://bucket"),
        (["/a/x.csv", "file:///b/y.csv"], "/"),
        (["a.csv", "b.csv"], "."),
    ],
)
def test_root_follows_from_the_uri_alone(uri: str | list[str], root: str) -> None:
    assert input_root(uri) == root


@pytest.mark.parametrize(
    "uris",
    [
        ["s3://one/a", "s3://two/a"],
        ["s3://one/a", "one/a"],
        ["/data/a", "data/b"],
        ["../a", "b"],
        ["~/a", "b"],
    ],
)
def test_a_list_needs_a_folder_in_common(uris: list[str]) -> None:
    with pytest.raises(InputError, match="have no folder in common"):
        input_root(uris)


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("gs://bucket/x", "no store is known for gs://"),
        ("s3://", "names no bucket"),
        ("s3://bucket/a//b", "empty folder name"),
        ("", "is empty"),
    ],
)
def test_unusable_uris(uri: str, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        input_root(uri)


def test_folder_is_read_with_sub_folders_and_without_hidden_names(tmp_path: Path) -> None:
    write(tmp_path, "b.parquet", "a/c.jsonl", "a/c.CSV", "z.ndjson.zst", "x.csv.gz")
    write(tmp_path, "_SUCCESS", "_tmp/d.csv", "a/.hidden.csv", "README.md", "a.parquet.gz")
    listed = list_input(Input(uri=str(tmp_path)))
    assert names(listed) == ["a/c.CSV", "a/c.jsonl", "b.parquet", "x.csv.gz", "z.ndjson.zst"]
    assert listed.store.uri == str(tmp_path)
    assert all(file.size == 1 and file.etag for file in listed.files)


def test_a_given_format_takes_every_ending(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "b", "_c.txt")
    listed = list_input(Input(uri=str(tmp_path), format="jsonl"))
    assert names(listed) == ["a.txt", "b"]
    assert names(list_input(Input(uri=str(tmp_path / "a.txt"), format="jsonl"))) == ["a.txt"]


def test_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "day=1/a.csv")
    assert names(list_input(Input(uri=f"file://{tmp_path}/day=1/a.csv"))) == ["a.csv"]
    monkeypatch.chdir(tmp_path)
    (file,) = list_input(Input(uri="day=1/a.csv")).files
    assert (file.name, file.partition) == ("a.csv", ())


def test_a_folder_that_is_named_like_a_file(tmp_path: Path) -> None:
    write(tmp_path, "out.parquet/part-0.parquet", "out.parquet/_SUCCESS")
    assert names(list_input(Input(uri=f"{tmp_path}/out.parquet"))) == ["out.parquet/part-0.parquet"]
    assert names(list_input(Input(uri=f"{tmp_path}/out.parquet/"))) == ["part-0.parquet"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.csv", ["a.csv", "b.csv"]),
        ("?.csv", ["a.csv", "b.csv"]),
        ("[!a].csv", ["b.csv"]),
        ("sub/*.csv", ["c.csv"]),
        ("s*/*.csv", ["sub/c.csv"]),
        ("**/*.csv", ["a.csv", "b.csv", "sub/c.csv", "sub/deep/d.csv"]),
        ("**", ["a.csv", "b.csv", "sub/c.csv", "sub/deep/d.csv"]),
        ("_*.csv", ["_h.csv"]),
    ],
)
def test_globs(tmp_path: Path, pattern: str, found: list[str]) -> None:
    write(tmp_path, "a.csv", "b.csv", "sub/c.csv", "sub/deep/d.csv", "_h.csv", "note.txt")
    assert names(list_input(Input(uri=f"{tmp_path}/{pattern}"))) == found


def test_a_list_names_each_file_once(tmp_path: Path) -> None:
    write(tmp_path, "a/x.csv", "a/y.csv", "b/z.csv")
    uris = [f"{tmp_path}/b/z.csv", f"{tmp_path}/a", f"{tmp_path}/a/x.csv", f"{tmp_path}/*/z.csv"]
    assert names(list_input(Input(uri=uris))) == ["a/x.csv", "a/y.csv", "b/z.csv"]


def test_partitions(tmp_path: Path) -> None:
    write(tmp_path, "day=2026-01-01/lang=a%2Fb/x.csv", "day=__HIVE_DEFAULT_PARTITION__/y.csv")
    listed = list_input(Input(uri=str(tmp_path)))
    assert [file.partition for file in listed.files] == [
        (("day", "2026-01-01"), ("lang", "a/b")),
        (("day", None),),
    ]
    assert listed.files[0].folder == "day=2026-01-01/lang=a%2Fb"
    assert listed.partition_keys == ("day", "lang")


def test_partition_of_a_name() -> None:
    assert partition_of("a=b=c/=d/e/f=.csv") == (("a", "b=c"),)
    with pytest.raises(InputError, match="two of its folders give the same key"):
        partition_of("a=1/a=2/x.csv")


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "prompts/january.jsonl")
    error = refusal(tmp_path / "prompts" / "janaury.jsonl")
    assert "janaury.jsonl: not found" in error.problem
    assert error.hint == f"there is {tmp_path}/prompts/january.jsonl"
    assert refusal(tmp_path / "promts" / "january.jsonl").hint == f"there is {tmp_path}/prompts"
    assert refusal(tmp_path / "xyz").hint == "correct input.uri"


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "the folder has no files" in refusal(tmp_path).problem


def test_a_folder_without_files_that_we_read(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "b.xlsx")
    error = refusal(tmp_path)
    assert "none of its 2 files can be read; one is a.txt" in error.problem
    assert ".parquet, .jsonl, .ndjson, .csv" in error.hint
    assert "input.format" in error.hint


def test_a_glob_that_matches_nothing(tmp_path: Path) -> None:
    write(tmp_path, "prompts-1.jsonl", "day=1/a.csv")
    error = refusal(f"{tmp_path}/promts-*.jsonl")
    assert "no file matches" in error.problem
    assert error.hint == f"there is {tmp_path}/prompts-1.jsonl"
    assert refusal(f"{tmp_path}/day=*").hint.endswith(f"write {tmp_path}/day=*/**")
    assert "a glob names files" in refusal(f"{tmp_path}/day=*/").problem
    assert "is no glob" in refusal(f"{tmp_path}/a**b.csv").problem
    assert "0 files were looked at" in refusal(f"{tmp_path}/none/*.csv").hint


def test_an_ending_that_says_nothing(tmp_path: Path) -> None:
    write(tmp_path, "prompts.txt")
    assert "its ending does not say what it is" in refusal(tmp_path / "prompts.txt").problem
    with pytest.raises(InputError, match="its ending does not say"):
        format_of("x.parquet.gz", Input(uri="x"))


def test_a_file_without_an_ending_counts_as_a_folder(tmp_path: Path) -> None:
    write(tmp_path, "prompts")
    assert "has no ending, and so counts as a folder" in refusal(tmp_path / "prompts").problem
    listed = list_input(Input(uri=f"{tmp_path}/prompt[s]", format="csv"))
    assert names(listed) == ["prompts"]


def test_credentials_are_refused_and_not_shown() -> None:
    with pytest.raises(ValidationError, match="credentials come from the environment") as caught:
        Input(uri="s3://user:secret@bucket/missing")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "output", "expected"),
    [
        ("data", "data", True),
        ("data", "data/out", True),
        ("data", "data/_out", False),
        ("data", "out", False),
        ("data", "data2", False),
        ("data", ".", False),
        (".", "out", True),
        ("data/a.csv", "data", False),
        ("data/a.csv", "data/out", False),
        ("data/a.parquet", "data/a.parquet/out", True),
        ("data/*.parquet", "data", True),
        ("data/*.parquet", "data/out", False),
        ("data/**/*.parquet", "data/out", True),
        ("data/**/*.jsonl", "data/out", False),
        ("data/**/*.parquet", "data/.out", False),
        ("data/*/*.parquet", "data", True),
        ("s3://bucket", "s3://bucket/out", True),
        ("s3://bucket/in", "s3://bucket/out", False),
        ("s3://bucket/in", "in", False),
    ],
)
def test_would_list(uri: str, output: str, expected: bool) -> None:
    if not output.startswith("s3://"):
        output = str(Path(output).absolute())
    assert would_list(uri, output) is expected
