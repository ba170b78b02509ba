"""Which files a job reads: from the `input.uri` of a spec to a sorted list of names.

The root of an input follows from the spec alone (`input_root`), never from what lies there today,
because a row's id is `<file relative to the root>:<row>` and must be the same tomorrow. So a name
with an ending, such as `day.parquet`, counts as a file and its root is its parent, even where a
folder of that name (Spark writes such) is found in its place.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import os.path
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

from fsspec.utils import glob_translate

from quantbatch.errors import InputError, StorageError
from quantbatch.input.formats import ENDINGS, format_of, has_known_ending
from quantbatch.spec import Storage
from quantbatch.storage import FileInfo, LocalStore, Store, open_store, redact

if TYPE_CHECKING:
    from quantbatch.spec import Input

Partition = tuple[tuple[str, str | None], ...]
"""The key=value folders of a file: column and value, from the root downwards; None is Hive's
null."""

_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_LOOKUPS_AT_ONCE = 16
"""Threads that look up the files of a list: a look-up on S3 is a round trip of some 30 ms."""


class InputFile(NamedTuple):
    """A file of the input."""

    name: str
    """Path relative to the root, with forward slashes."""
    size: int
    etag: str
    partition: Partition

    @property
    def folder(self) -> str:
        """Its key=value folders as they are written, such as `day=2026-01-01`."""
        return "/".join(_hive_folders(self.name))


class Listing(NamedTuple):
    """The files of an input."""

    store: Store
    """The store at the input's root."""
    files: tuple[InputFile, ...]
    """In the order of their names, each once."""

    @property
    def partition_keys(self) -> tuple[str, ...]:
        """Names of the columns that come from folders."""
        return tuple(dict.fromkeys(key for file in self.files for key, _ in file.partition))


class _Place(NamedTuple):
    """One URI in two halves."""

    anchor: str
    """What paths must share to have a folder in common: `s3://bucket/`, `/`, `~/`, `../` or
    nothing."""
    path: str
    """The rest, without a slash at its ends."""
    is_folder: bool
    uri: str

    @property
    def is_glob(self) -> bool:
        return any(character in self.path for character in "*?[")

    @property
    def pattern(self) -> str:
        """What a glob says of names below its root."""
        return _relative(self.path, self.root)

    @property
    def root(self) -> str:
        """The path of the folder that a listing begins at."""
        if self.is_glob:
            return re.split(r"[*?\[]", self.path, maxsplit=1)[0].rpartition("/")[0]
        if self.is_folder or not re.search(r"[^/]\.[A-Za-z][A-Za-z0-9]*$", self.path):
            return self.path
        return posixpath.dirname(self.path)


def input_root(uri: str | Sequence[str]) -> str:
    """Return the folder that row ids are relative to.

    A folder is its own root, a file's root is its parent, a glob's the longest folder without a
    wildcard, and a list's the deepest folder that holds them all. A name counts as a file if it has
    an ending that begins with a letter, and no slash at its end.

    Raises:
        InputError: A URI has an unknown scheme, or a list has no folder in common.
    """
    return _common_root(_places(uri))


def list_input(input: Input) -> Listing:
    """List the files of an input.

    A folder is read with its sub-folders, without names that begin with `_` or `.`; so is a glob,
    unless it has a part that begins with one of them. With the format `auto`, folders and globs
    yield the files with an ending that we know.

    Raises:
        InputError: Something is missing, or nothing that can be read was found.
    """
    places = _places(input.uri)
    store = open_store(_common_root(places), input.storage)
    base = _common_path(places)
    look = functools.partial(_find, store, base, input)
    if len(places) == 1:
        found = look(places[0])
    else:
        with ThreadPoolExecutor(_LOOKUPS_AT_ONCE, "listing") as pool:
            found = [info for infos in pool.map(look, places) for info in infos]
    infos = {info.key: info for info in found}
    files = (InputFile(k, i.size, i.etag, partition_of(k)) for k, i in sorted(infos.items()))
    return Listing(store, tuple(files))


def would_list(uri: str, output: str) -> bool:
    """Say whether files that a job writes to the folder `output` would be among an input.

    Args:
        uri: One URI of the input.
        output: The folder as a store names it: an absolute path or s3://bucket/prefix.
    """
    (place,) = _places(uri)
    root = _absolute(place.anchor + place.root)
    inside = _below(_absolute(output), root)
    if inside is None:
        return False
    written = [posixpath.join(inside, folder, "part-000000.parquet") for folder in ("", "day=1")]
    if place.is_glob:
        return any(_matches(place, n) and pattern_matches(place.pattern, n) for n in written)
    target = _relative(place.path, place.root)
    return _below(inside, target) is not None and not _hidden(inside)


def partition_of(name: str) -> Partition:
    """Return what the key=value folders of a file say.

    Raises:
        InputError: Two folders give the same key.
    """
    pairs = [folder.split("=", 1) for folder in _hive_folders(name)]
    keys = [unquote(key) for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise InputError(f"{name}: two of its folders give the same key", "rename one of them")
    values = [None if value == _HIVE_NULL else unquote(value) for _, value in pairs]
    return tuple(zip(keys, values, strict=True))


def pattern_matches(pattern: str, name: str) -> bool:
    """Say whether a glob, in fsspec's dialect, matches a file's name."""
    return _compiled(pattern).match(name) is not None


@functools.lru_cache(maxsize=64)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(glob_translate(pattern))
    except ValueError as error:
        raise InputError(f"input.uri: {pattern!r} is no glob: {error}") from error


def _places(uri: str | Sequence[str]) -> list[_Place]:
    uris = [uri] if isinstance(uri, str) else uri
    return [_place(each) for each in dict.fromkeys(uris)]


def _place(uri: str) -> _Place:
    bare = uri.removeprefix("file://")
    is_folder = bare.endswith("/") or posixpath.basename(bare) in ("", ".", "..")
    if bare.startswith("s3://"):
        bucket, _, key = bare.removeprefix("s3://").partition("/")
        if not bucket:
            raise InputError(f"input.uri: {uri!r} names no bucket", "write s3://bucket/prefix")
        if {"", ".", ".."} & set(key.strip("/").split("/")) and key.strip("/"):
            raise InputError(f"input.uri: {uri!r} has an empty folder name, . or ..")
        return _Place(f"s3://{bucket}/", key.strip("/"), is_folder or not key, uri)
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", bare):
        raise InputError(
            f"input.uri: no store is known for {scheme[1]}://",
            "use a local path, file:// or s3://",
        )
    if not bare:
        raise InputError("input.uri: is empty", "name a file, a folder or a glob")
    path = re.sub("^//", "/", posixpath.normpath(bare))  # POSIX lets two slashes be special
    anchor = re.match(r"/|~[^/]*(?:/|$)|(?:\.\.(?:/|$))*", path)
    assert anchor is not None, "the pattern matches the empty string too"
    rest = path[anchor.end() :]
    return _Place(anchor[0], "" if rest == "." else rest, is_folder, uri)


def _common_root(places: Sequence[_Place]) -> str:
    first = places[0]
    for place in places:
        if place.anchor != first.anchor:
            raise InputError(
                f"input.uri: {first.uri} and {place.uri} have no folder in common",
                "give all of them in one bucket, or all as absolute local paths",
            )
    return (first.anchor + _common_path(places)).rstrip("/") or first.anchor or "."


def _common_path(places: Sequence[_Place]) -> str:
    return posixpath.commonpath([place.root for place in places])


def _find(store: Store, base: str, input: Input, place: _Place) -> list[FileInfo]:
    """List what one URI stands for.

    Args:
        store: The store at the input's root.
        base: The path of the input's root.
        input: The spec of the input.
        place: The URI.
    """
    if place.is_glob:
        return _find_glob(store, base, input, place)
    name = _relative(place.path, base)
    found = _list(store, name)
    if found is None:
        return [_one_file(store, name, input, place)]
    if not found:
        raise _nothing_in(store, name, place)
    shown = [info for info in found if not _hidden(_relative(info.key, name))]
    return _readable(shown, found, input, place)


def _list(store: Store, name: str) -> list[FileInfo] | None:
    """Return all files below a folder, or None if the name is that of a file."""
    try:
        found = [info for info in store.list(name) if not _stands_for_folder(info)]
    except StorageError as error:
        if isinstance(error.__cause__, NotADirectoryError):
            return None
        raise
    # S3 has no folders: what it lists for the name of an object is that object.
    return None if [info.key for info in found] == [name] else found


def _stands_for_folder(info: FileInfo) -> bool:
    """Recognize the empty objects that consoles and Hadoop leave on S3 for folders."""
    return info.size == 0 and (not info.key or info.key.endswith(("/", "_$folder$")))


def _one_file(store: Store, name: str, input: Input, place: _Place) -> FileInfo:
    if not name:
        raise InputError(
            f"{_shown(place)}: is a file, but has no ending, and so counts as a folder",
            "rename it, or write it as a glob, such as data/prompt[s]",
        )
    format_of(_shown(place), input)  # refuses an unknown ending
    return store.info(name)


def _find_glob(store: Store, base: str, input: Input, place: _Place) -> list[FileInfo]:
    if place.is_folder:
        raise InputError(
            f"{_shown(place)}: a glob names files, not folders", f"write {_shown(place)}**"
        )
    prefix = _relative(place.root, base)
    found = _list(store, prefix) or []
    matching = [i for i in found if pattern_matches(place.pattern, _relative(i.key, prefix))]
    shown = [info for info in matching if _matches(place, _relative(info.key, prefix))]
    if shown:
        return _readable(shown, matching, input, place)
    folders = {parent for i in found for parent in _parents(_relative(i.key, prefix))}
    if any(pattern_matches(place.pattern, folder) for folder in folders):
        hint = f"it matches folders: to read the files in them write {_shown(place)}/**"
    else:
        hint = _suggestion(store, prefix, place) or f"{len(found):,} files were looked at"
    raise InputError(f"{_shown(place)}: no file matches", hint)


def _matches(place: _Place, name: str) -> bool:
    """Leave out hidden names, unless the glob asks for such."""
    return not _hidden(name) or _hidden(place.pattern)


def _readable(
    shown: list[FileInfo], found: list[FileInfo], input: Input, place: _Place
) -> list[FileInfo]:
    auto = input.format == "auto"
    files = [info for info in shown if not auto or has_known_ending(info.key)]
    if files:
        return files
    example = (shown or found)[0].key
    raise InputError(
        f"{_shown(place)}: none of its {len(found):,} files can be read; one is {example}",
        f"files must end in one of {', '.join(ENDINGS)}, or set input.format; "
        "names that begin with _ or . are skipped",
    )


def _nothing_in(store: Store, name: str, place: _Place) -> InputError:
    try:
        store.info(name)
    except FileNotFoundError:
        return InputError(
            f"{_shown(place)}: not found", _suggestion(store, name, place) or "correct input.uri"
        )
    return InputError(f"{_shown(place)}: the folder has no files", "correct input.uri")


def _suggestion(store: Store, name: str, place: _Place) -> str:
    """Name what is nearest to a missing local file; looking for it on S3 could take minutes."""
    if not isinstance(store, LocalStore):
        return ""
    path = Path(store.uri, name)
    with contextlib.suppress(PermissionError):
        if path.exists():
            path = Path(path, posixpath.basename(place.path))
        while not path.parent.is_dir():
            path = path.parent
        others = [other.name for other in path.parent.iterdir()]
        if close := difflib.get_close_matches(path.name, others, n=1):
            return f"there is {path.parent / close[0]}"
    return ""


def _shown(place: _Place) -> str:
    # A query string is where credentials hide, but in a glob the question mark is a wildcard.
    return redact(place.uri) if "@" in place.uri else place.uri


def _absolute(uri: str) -> str:
    full = open_store(uri or ".", Storage()).uri
    return full if full.startswith("s3://") else os.path.normpath(full)


def _below(path: str, folder: str) -> str | None:
    """Return a path relative to a folder, or None if it is elsewhere."""
    if not folder or path == folder:
        return "" if path == folder else path
    folder = folder.rstrip("/") + "/"
    return path[len(folder) :] if path.startswith(folder) else None


def _relative(key: str, folder: str) -> str:
    return key[len(folder) :].lstrip("/")


def _hidden(name: str) -> bool:
    return any(part.startswith(("_", ".")) for part in name.split("/"))


def _parents(name: str) -> Iterable[str]:
    while name := posixpath.dirname(name):
        yield name


def _hive_folders(name: str) -> Iterator[str]:
    return (part for part in name.split("/")[:-1] if part.find("=") > 0)
