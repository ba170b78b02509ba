"""A repository of the Hugging Face hub, as far as a plan needs it: small files and headers.

huggingface_hub takes half a second to import, so it is imported where it is used: a model in a
folder does not wait for it. Its client has no time limit of its own (2.4: a server that accepts and
never answers was waited for until we killed it after 2 minutes), so the first request has one.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from quantbatch.errors import ModelError
from quantbatch.model import gguf
from quantbatch.model.headers import (
    MAX_HEADER_BYTES,
    TensorInfo,
    no_safetensors,
    read_header,
    shard_names,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from quantbatch.model.gguf import GgufHeader
    from quantbatch.spec import Model

TIMEOUT_S = 10
FIRST_GGUF_BYTES = 4 << 20
"""Read first of a GGUF file: a vocabulary of 32,000 words and its merges take 1 to 2 MB."""


class Snapshot(NamedTuple):
    """A repository at one commit."""

    folder: Path
    """The snapshot's folder in the local cache; weights need not be in it."""
    commit: str
    tensors: tuple[TensorInfo, ...]


def fetch(model: Model, small_files: Sequence[str]) -> Snapshot:
    """Bring a repository's small files into the cache, and read the headers of its weights.

    Without a network, or with HF_HUB_OFFLINE, what is in the cache is used.

    Args:
        model: Names repository and revision.
        small_files: Names of the files to bring; those that the repository lacks are left out.

    Raises:
        ModelError: There is no such repository, or it can't be reached and is not in the cache.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        folder = _fetch_small_files(model, small_files)
        return Snapshot(folder, folder.name, _tensors(model, folder))
    except (HTTPError, OSError, ValueError) as error:
        raise _explained(model, error) from error


class GgufSnapshot(NamedTuple):
    """A GGUF file of a repository at one commit."""

    folder: Path
    commit: str
    header: GgufHeader


def fetch_gguf(model: Model, small_files: Sequence[str], file: str) -> GgufSnapshot:
    """Read the header of a GGUF file, from the cache if it is there, else by range requests.

    Raises:
        ModelError: There is no such file, or it can't be reached and is not in the cache.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        folder = _fetch_small_files(model, small_files)
        if (folder / file).is_file():
            return GgufSnapshot(folder, folder.name, gguf.read_gguf(folder / file))
        return GgufSnapshot(folder, folder.name, _remote_gguf(model.id, file, folder.name))
    except (HTTPError, OSError, ValueError) as error:
        raise _explained(model, error) from error


def _remote_gguf(name: str, file: str, commit: str) -> gguf.GgufHeader:
    """Read a header whose length nobody tells: more of it each time, until it is whole."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    url, length = hf_hub_url(name, file, revision=commit), FIRST_GGUF_BYTES
    while True:
        headers = build_hf_headers() | {"Range": f"bytes=0-{length - 1}"}
        answer = get_session().get(url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True)
        hf_raise_for_status(answer)
        try:
            return gguf.parse(answer.content, f"{name} ({file})")
        except ModelError:
            if len(answer.content) < length or length > MAX_HEADER_BYTES:
                raise
            length *= 4


def fetch_whole(name: str, file: str, commit: str) -> Path:
    """Bring a file of a repository into the cache; returns where it is.

    Raises:
        ModelError: It is not there and can't be fetched.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    try:
        with _without_progress_bars():
            return Path(hf_hub_download(name, file, revision=commit))
    except (HTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"{file} of {name} can't be fetched: {type(error).__name__}: {error}",
            "fetch it where there is a network (hf download), or set HF_HUB_CACHE to where it is",
        ) from error


def _fetch_small_files(model: Model, names: Sequence[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    revision: str | None = model.revision
    cause: Exception | None = None
    try:
        revision = HfApi().model_info(model.id, revision=revision, timeout=TIMEOUT_S).sha
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except (HTTPError, ConnectionError) as error:
        cause = error
    try:
        with _without_progress_bars():
            folder = snapshot_download(
                model.id,
                revision=revision,
                allow_patterns=list(names),
                local_files_only=cause is not None,
            )
    except LocalEntryNotFoundError as error:
        raise _not_in_cache(model, cause or error) from error
    return Path(folder)


def _tensors(model: Model, folder: Path) -> tuple[TensorInfo, ...]:
    """Read the headers of all shards: from the cache if they are there, else by range requests."""
    files = shard_names(folder)
    if all((folder / file).is_file() for file in files):
        return tuple(tensor for file in files for tensor in read_header(folder / file).tensors)
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda file: _remote_header(model.id, file, folder.name), files)
        return tuple(tensor for tensors in found for tensor in tensors)


def _remote_header(name: str, file: str, commit: str) -> list[TensorInfo]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, SafetensorsParsingError

    api = HfApi()
    try:
        found = api.parse_safetensors_file_metadata(name, file, revision=commit, timeout=TIMEOUT_S)
    except EntryNotFoundError as error:
        raise no_safetensors(name, api.list_repo_files(name, revision=commit)) from error
    except SafetensorsParsingError as error:
        raise ModelError(f"{name}: {file} has a damaged header: {error}") from error
    return [TensorInfo(key, each.dtype, tuple(each.shape)) for key, each in found.tensors.items()]


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    were_off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            enable_progress_bars()


def _explained(model: Model, error: Exception) -> ModelError:
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            return ModelError(
                f"{_where(model)} asks for its licence to be accepted first",
                f"accept it on https://huggingface.co/{model.id} and set HF_TOKEN",
            )
        case errors.RevisionNotFoundError():
            return ModelError(f"{_where(model)}: there is no such revision")
        case errors.RepositoryNotFoundError():
            return ModelError(
                f"{_where(model)} is neither a folder here nor a repository of the hub",
                "for a private repository set HF_TOKEN",
            )
        case errors.OfflineModeIsEnabled():
            return _not_in_cache(model, error)
        case _:
            return ModelError(
                f"{_where(model)} can't be read from the hub: {type(error).__name__}: {error}"
            )


def _not_in_cache(model: Model, cause: Exception) -> ModelError:
    return ModelError(
        f"{_where(model)} is neither a folder here nor wholly in the hub's cache, and the hub can't"
        f" be reached ({type(cause).__name__}: {cause})",
        "fetch it where there is a network (hf download), or set HF_HUB_CACHE to where it is",
    )


def _where(model: Model) -> str:
    return f"{model.id} at revision {model.revision}" if model.revision else model.id
