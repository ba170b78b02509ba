"""Collect the quickstart's rows: docstrings of the Python that runs this script.

    python jobs/quickstart/collect.py OUT_DIR

Each row is the docstring of a module, class, function or method of the standard library. Its gold
label is the top-level package it stands in (`asyncio`, `email`, `tkinter`). Nothing is downloaded
and no module is imported: the source is parsed with `ast`. Only the held-out side is written, which
`train.py` has not shown to the model.

The split is a property of the text, not of this run. Its key is the first words of a docstring,
lower case, letters only: copies, copies with another version number and copies with another tail
all fall on the same side, here and on any other Python.

The labels are fixed, so that every Python is asked the same question: the packages that have at
least 25 distinct docstrings on the training side in CPython 3.11.7 and are still there in 3.14.
`_pydecimal` is filed under `decimal` and `_pyio` under `io`. Docstrings of other packages are not
collected.
"""

import argparse
import ast
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

PACKAGES = (
    "ast",
    "asyncio",
    "bdb",
    "codecs",
    "collections",
    "concurrent",
    "configparser",
    "contextlib",
    "datetime",
    "decimal",
    "difflib",
    "doctest",
    "email",
    "encodings",
    "enum",
    "ftplib",
    "http",
    "imaplib",
    "importlib",
    "inspect",
    "io",
    "ipaddress",
    "logging",
    "mailbox",
    "multiprocessing",
    "pathlib",
    "pdb",
    "pydoc",
    "shutil",
    "smtplib",
    "socketserver",
    "ssl",
    "statistics",
    "subprocess",
    "tarfile",
    "threading",
    "tkinter",
    "turtle",
    "typing",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
    "xmlrpc",
    "zipfile",
)

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

MIN_CHARS = 40
HELD_OUT_FRACTION = 0.25
# Docstrings that begin alike are often copies of each other, edited further down.
KEY_WORDS = 12


class Docstring(NamedTuple):
    """One row."""

    docstring: str
    package: str
    qualified_name: str
    line: int


def docstrings() -> Iterator[Docstring]:
    """Yield each distinct docstring of `PACKAGES` once, in an order that does not vary."""
    seen: set[str] = set()
    for package in PACKAGES:
        for path in source_files(package):
            for row in _docstrings_of(path, package=package):
                text = " ".join(_words(row.docstring))
                if len(row.docstring) >= MIN_CHARS and text not in seen:
                    seen.add(text)
                    yield row


def is_held_out(docstring: str) -> bool:
    """Whether a docstring is on the side that the model was not trained on."""
    return int.from_bytes(_digest(docstring)[:8]) < HELD_OUT_FRACTION * 2**64


def write_shards(folder: Path, rows: Iterable[Docstring], *, shards: int = 4) -> list[Path]:
    """Write rows as `shards` Parquet files of nearly equal length.

    The order is that of the split's hash: the same on every run, and each file is a fair sample.
    """
    ordered = sorted(rows, key=lambda row: (_digest(row.docstring), row.docstring))
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard in range(shards):
        part = ordered[len(ordered) * shard // shards : len(ordered) * (shard + 1) // shards]
        table = pa.Table.from_pylist([row._asdict() for row in part], schema=SCHEMA)
        paths.append(folder / f"docstrings-{shard:02d}.parquet")
        pq.write_table(table, paths[-1])
    return paths


SCHEMA = pa.schema(
    [
        pa.field("docstring", pa.string(), nullable=False),
        pa.field("package", pa.string(), nullable=False),
        pa.field("qualified_name", pa.string(), nullable=False),
        pa.field("line", pa.int32(), nullable=False),
    ]
)


def source_files(package: str) -> list[Path]:
    """List a package's own source files, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    found: list[Path] = []
    for stem in (package, f"_py{package}"):
        found += root.glob(f"{stem}.py")
        found += root.glob(f"{stem}/**/*.py")
    return sorted(p for p in found if not {"test", "tests"} & set(p.relative_to(root).parts))


def _docstrings_of(path: Path, *, package: str) -> Iterator[Docstring]:
    root = Path(sysconfig.get_path("stdlib"))
    parts = path.relative_to(root).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    for node, name in _documented(ast.parse(path.read_bytes()), module):
        text = ast.get_docstring(node, clean=False)
        if text:
            line = node.body[0].lineno
            yield Docstring(inspect.cleandoc(text), package, name, line)


def _documented(node: ast.AST, name: str) -> Iterator[tuple[_Documented, str]]:
    """Yield a node and all in it that may carry a docstring, each with its dotted name."""
    if isinstance(node, _Documented):
        yield node, name
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{name}.{child.name}")
        else:
            yield from _documented(child, name)


def _digest(docstring: str) -> bytes:
    return hashlib.sha256(" ".join(_words(docstring)[:KEY_WORDS]).encode()).digest()


def _words(docstring: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", docstring.lower())


def main() -> None:
    """Write the held-out rows to the folder given on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the Parquet files go")
    parser.add_argument("--shards", type=int, default=4, help="number of files")
    arguments = parser.parse_args()
    held_out = [row for row in docstrings() if is_held_out(row.docstring)]
    write_shards(arguments.folder, held_out, shards=arguments.shards)
    print(f"{len(held_out)} held-out docstrings of {len(PACKAGES)} packages")


if __name__ == "__main__":
    main()
