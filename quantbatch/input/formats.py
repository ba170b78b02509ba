"""Which formats there are, and which of them a file's name stands for."""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING, Literal

from quantbatch.errors import InputError

if TYPE_CHECKING:
    from quantbatch.spec import Input

Format = Literal["parquet", "jsonl", "csv", "openai-batch"]

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Endings of compressed text, with pyarrow's names of the codecs."""
_FORMATS: dict[str, Format] = {
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
}
ENDINGS = (
    *_FORMATS,
    *(end + more for end, kind in _FORMATS.items() for more in COMPRESSIONS if kind != "parquet"),
)
"""Endings of the files that we can read; Parquet is compressed within."""


def has_known_ending(name: str) -> bool:
    """Say whether a file's ending says what it is."""
    return name.lower().endswith(ENDINGS)


def format_of(name: str, input: Input) -> Format:
    """Return the format of a file: the spec's, or what its ending says.

    Raises:
        InputError: The ending says nothing.
    """
    if input.format != "auto":
        return input.format
    if not has_known_ending(name):
        raise InputError(
            f"{name}: its ending does not say what it is",
            f"set input.format, or rename it to end in one of {', '.join(ENDINGS)}",
        )
    stem, ending = posixpath.splitext(name.lower())
    return _FORMATS[posixpath.splitext(stem)[1] if ending in COMPRESSIONS else ending]


def codec_of(name: str) -> str | None:
    """Return pyarrow's name of the compression that a file's ending stands for."""
    return COMPRESSIONS.get(posixpath.splitext(name.lower())[1])
