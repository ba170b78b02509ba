"""What the headers of safetensors files say: which tensors, of which type and shape.

Such a file begins with 8 bytes of length and as much JSON, so a model of 60 GB is described by a
few hundred kilobytes (https://huggingface.co/docs/safetensors/index#format).
"""

from __future__ import annotations

import json
import math
import re
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from quantbatch.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

SHARD = re.compile(r"[^/\\\0]+\.safetensors")
"""Name of a file of weights; a path would lead out of the model's folder."""
MAX_HEADER_BYTES = 100_000_000
"""Longest header that the safetensors library itself accepts."""


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint, as the header of its file describes it."""

    name: str
    dtype: str
    """In the words of safetensors: BF16, F16, F32, U8, I8, ..."""
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class Header(NamedTuple):
    """The header of one file."""

    tensors: tuple[TensorInfo, ...]
    size: int
    """Bytes of the header with its length: where the data begins."""


def read_headers(folder: Path) -> dict[Path, Header]:
    """Read the headers of the files that transformers would load, in the order of their names.

    Raises:
        ModelError: There are none, or they are cut short, damaged or not those of the index.
    """
    if (folder / SINGLE_FILE).is_file():
        return {folder / SINGLE_FILE: read_header(folder / SINGLE_FILE)}
    if not (folder / INDEX_FILE).is_file():
        raise no_safetensors(str(folder), [file.name for file in folder.iterdir()])
    shards = shard_names(folder)
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder} lacks {few(missing)}, which {INDEX_FILE} names",
            "the download is not complete: fetch the model again",
        )
    headers = {folder / name: read_header(folder / name) for name in shards}
    found = {tensor.name for header in headers.values() for tensor in header.tensors}
    absent = set(_weight_map(folder)) - found
    if absent:
        raise ModelError(
            f"the shards of {folder} lack {few(absent)}, which {INDEX_FILE} names",
            "index and shards are of different models: fetch the model again",
        )
    return headers


def shard_names(folder: Path) -> list[str]:
    """Return the files that the index of a folder names; without an index, the single file."""
    if not (folder / INDEX_FILE).is_file():
        return [SINGLE_FILE]
    return sorted(set(_weight_map(folder).values()))


def _weight_map(folder: Path) -> dict[str, str]:
    found = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ModelError(f"{folder / INDEX_FILE} has no weight_map")
    odd = {str(name) for name in found.values() if not SHARD.fullmatch(str(name))}
    if odd:
        raise ModelError(
            f"{folder / INDEX_FILE} names {few(odd)}, and weights are files in the model's own"
            " folder that end in .safetensors",
            "pickles can run code when they are read: convert the model where you trust it",
        )
    return found


def read_header(path: Path) -> Header:
    """Read one header and check that the file is as long as it says.

    Raises:
        ModelError: The file is cut short, damaged, or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ModelError(f"{path} is no safetensors file, or is cut short ({size:,} bytes)")
        text = file.read(length)
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        ends = [int(entry["data_offsets"][1]) for entry in entries.values()]
        tensors = tuple(
            TensorInfo(name, str(entry["dtype"]), tuple(map(int, entry["shape"])))
            for name, entry in entries.items()
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} has a damaged header: {error!r}") from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ModelError(
            f"{path} has {size:,} bytes, but its header describes {expected:,}",
            "the file is cut short or damaged: fetch it again",
        )
    return Header(tensors, 8 + length)


def no_safetensors(where: str, names: Iterable[str]) -> ModelError:
    """Say why weights that are not safetensors are not loaded."""
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickles:
        return ModelError(
            f"{where} has its weights as pickles only ({few(pickles)}), which can run code when"
            " they are read",
            "convert it where you trust it: AutoModelForCausalLM.from_pretrained(...)"
            ".save_pretrained(folder) writes safetensors",
        )
    return ModelError(f"{where} has neither {SINGLE_FILE} nor {INDEX_FILE}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        ModelError: It can't be read, or holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} can't be read: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds no JSON object")
    return found


def few(names: Iterable[str]) -> str:
    """Return the first three names of many, for a message."""
    found = sorted(names)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(found[:3]) + more
