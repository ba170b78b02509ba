"""A model as files: its configuration, the shapes of its tensors, its chat template.

Nothing here reads a weight or imports torch, and that is enough to plan a job. Weights that are
pickles and a shard cut short are refused as they are read, what can't work for another reason by
`refusals.py`, before anybody waits for a card.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantbatch.errors import ModelError
from quantbatch.model import formats, gguf, hub, refusals
from quantbatch.model.formats import How, Machine, quant_method, quant_section
from quantbatch.model.headers import INDEX_FILE, Header, TensorInfo, read_headers, read_json
from quantbatch.spec import Unquantized

if TYPE_CHECKING:
    from collections.abc import Mapping

    from quantbatch.model.formats import Capability
    from quantbatch.model.gguf import GgufHeader
    from quantbatch.spec import Model

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    INDEX_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Everything of a model that decides its answers, besides the weights."""

CODE = ("*.py", "**/*.py")
"""Files of a repository that are brought along only if its code may run."""

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
"""Names under which configurations give the context, Llama's first."""

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")

SAMPLES = 32
SAMPLE_BYTES = 64 * 1024
"""2 MiB of each shard go into the digest."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model that can be loaded, as far as its files tell."""

    folder: Path
    """Holds config.json and the tokenizer: the folder itself, or the snapshot in the hub cache."""
    id: str
    commit: str
    """40 hexadecimal digits for a repository of the hub; empty for a local folder."""
    config: dict[str, Any]
    """config.json."""
    tensors: tuple[TensorInfo, ...]
    chat_template: str | None
    context_tokens: int | None
    """Longest prompt and answer together; None if the configuration does not tell."""
    quantized: str | None
    """Method by which the checkpoint is quantized already, such as bitsandbytes, gptq or awq."""
    digest: str
    """Identity of the weights: the commit for a repository of the hub, with a GGUF file's name as
    a SHA-256; else see `_digest`.
    """
    expanded: bool = False
    """Whether its weights are expanded to `model.dtype` as they are loaded."""
    gguf: str = ""
    """Name of the GGUF file that is the model; empty for safetensors."""
    trusted: bool = False
    """Whether Python code of the repository may run, at `commit`."""

    @property
    def text_config(self) -> dict[str, Any]:
        """The part of the configuration that describes the language model."""
        return text_config(self.config)

    @property
    def is_native(self) -> bool:
        """Whether transformers has the model's type; else a plan knows its layers by name only."""
        return refusals.is_native(str(self.config.get("model_type", "")))


def open_checkpoint(model: Model, capability: Capability | None = None) -> Checkpoint:
    """Describe a model from its files, fetching small ones if it lives on the hub.

    Args:
        model: Where it is, and how it is to be loaded.
        capability: Compute capability of the card that it is for; None if there is none or it is
            not known. Then nothing is counted on that needs a certain card.

    Raises:
        ModelError: It is not there, not whole, or can't be loaded as the spec asks.
    """
    checkpoint = find_checkpoint(model)
    refusals.refuse_foreign_code(checkpoint)
    if checkpoint.gguf == "":
        refusals.refuse_other_tasks(checkpoint)
    if checkpoint.quantized is None:
        return checkpoint
    section = quant_section(checkpoint.config)
    found = formats.judge(checkpoint.quantized, section, Machine.this(capability))
    checkpoint = replace(checkpoint, expanded=found.how is How.EXPANDED)
    refusals.refuse_other_quantization(checkpoint, model)
    refusals.refuse_format(checkpoint, model, found)
    refusals.refuse_codes_without_scales(checkpoint)
    return checkpoint


def open_packed_gguf(model: Model) -> Checkpoint:
    """Describe a GGUF file that the engine llama_cpp is to run as it is.

    Raises:
        ModelError: It is no such file, or the engine's package is not there.
    """
    checkpoint = find_checkpoint(model)
    if not checkpoint.gguf:
        raise ModelError(
            f"engine.kind llama_cpp runs GGUF files, and {model.id} is none",
            "give the path of a file as model.id, or its name as model.file",
        )
    if model.bits is not None or not isinstance(model.resolved().quantization, Unquantized):
        raise ModelError(
            f"engine.kind llama_cpp takes {checkpoint.gguf} in the bits that it has",
            "leave out model.bits and model.quantization, or give a file with other bits",
        )
    found = formats.packed_gguf(Machine.this())
    if found.how is How.REFUSED:
        raise ModelError(f"engine.kind llama_cpp can't run here: {found.reason}", found.remedy)
    return checkpoint


def find_checkpoint(model: Model) -> Checkpoint:
    """Describe a model from its files, without asking whether it can be loaded as the spec says.

    Raises:
        ModelError: It is not there, or not whole.
    """
    folder = Path(model.id).expanduser()
    if model.trust_remote_code and folder.exists():
        raise ModelError(
            f"model.trust_remote_code: {model.id} is a folder, and a folder has no commit to pin",
            "give the repository's name, which is looked for in the hub's cache too"
            " (HF_HUB_OFFLINE=1 where there is no network)",
        )
    if folder.is_file() and folder.suffix == ".gguf":
        if model.file:
            raise ModelError(
                f"model.id {model.id} is a GGUF file already, and model.file names another",
                "leave out model.file",
            )
        return _open_gguf(model, folder.resolve())
    if folder.is_dir() and model.file:
        return _open_gguf(model, folder.resolve() / model.file)
    if folder.is_dir():
        return _open_folder(model, folder.resolve())
    if REPOSITORY.fullmatch(model.id) and not folder.exists():
        return _open_repository(model)
    raise _no_such_folder(model.id, folder)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config.json that describes the language model."""
    return dict(config.get("text_config") or config)


def _open_folder(model: Model, folder: Path) -> Checkpoint:
    config = _read_config(folder)
    headers = read_headers(folder)
    return Checkpoint(
        folder=folder,
        id=model.id,
        commit="",
        config=config,
        tensors=tuple(tensor for header in headers.values() for tensor in header.tensors),
        chat_template=_chat_template(folder),
        context_tokens=_context_tokens(config),
        quantized=quant_method(config),
        digest=_digest(folder, headers),
    )


def _open_gguf(model: Model, path: Path) -> Checkpoint:
    if not path.is_file():
        there = [each.name for each in path.parent.glob("*.gguf")]
        raise ModelError(
            f"model.file {path.name!r}: there is no such file in {path.parent}",
            f"there are {', '.join(sorted(there)) or 'no GGUF files'}",
        )
    header = gguf.read_gguf(path)
    described = _of_gguf(model, path.parent, path.name, header)
    return replace(described, digest=_digest(path.parent, {path: gguf.as_header(header)}))


def _of_gguf(model: Model, folder: Path, name: str, header: GgufHeader) -> Checkpoint:
    config = gguf.config_of(header)
    template = header.metadata.get("tokenizer.chat_template")
    return Checkpoint(
        folder=folder,
        id=model.id,
        commit="",
        config=config,
        tensors=gguf.as_header(header).tensors,
        chat_template=template if isinstance(template, str) else _chat_template(folder),
        context_tokens=_context_tokens(config),
        quantized="gguf",
        digest="",
        gguf=name,
    )


def _open_repository(model: Model) -> Checkpoint:
    try:
        if model.file:
            found = hub.fetch_gguf(model, SMALL_FILES, model.file)
            described = _of_gguf(model, found.folder, model.file, found.header)
            # A commit often holds the same model in many files, each in other bits.
            digest = hashlib.sha256(f"{found.commit}:{model.file}".encode()).hexdigest()
            return replace(described, commit=found.commit, digest=digest)
        code = CODE if model.trust_remote_code else ()
        snapshot = hub.fetch(model, (*SMALL_FILES, *code))
    except ModelError as error:
        # A repository's name looks like a relative path, and may be one with a typing error.
        raise ModelError(error.problem, error.hint + _nearest_folder(Path(model.id))) from error
    config = _read_config(snapshot.folder)
    return Checkpoint(
        folder=snapshot.folder,
        id=model.id,
        commit=snapshot.commit,
        config=config,
        tensors=snapshot.tensors,
        chat_template=_chat_template(snapshot.folder),
        context_tokens=_context_tokens(config),
        quantized=quant_method(config),
        digest=snapshot.commit,
        trusted=model.trust_remote_code,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    if (folder / "config.json").is_file():
        return read_json(folder / "config.json")
    if (folder / "adapter_config.json").is_file():
        hint = "it holds a LoRA adapter: merge it into its base model and save that"
    elif any(folder.glob("*.gguf")):
        hint = "name the GGUF file as model.file"
    else:
        hint = "model.id is the folder that save_pretrained wrote, or a repository of the hub"
    raise ModelError(f"{folder} has no config.json", hint)


def _context_tokens(config: Mapping[str, Any]) -> int | None:
    text = text_config(config)
    return next((text[key] for key in CONTEXT_KEYS if isinstance(text.get(key), int)), None)


def _chat_template(folder: Path) -> str | None:
    """Find the template in any of its three places, in the order in which transformers looks."""
    path = folder / "chat_template.jinja"
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ModelError(f"{path} can't be read: {error}") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(found, list):
            named = {each.get("name"): each for each in found if isinstance(each, dict)}
            found = named.get("default", {}).get("template")
        if isinstance(found, str):
            return found
    return None


def _digest(folder: Path, headers: Mapping[Path, Header]) -> str:
    """Return the identity of a local model: SHA-256, as hex.

    It covers the configuration and the tokenizer whole, and of each safetensors file its size, its
    header and 32 evenly spaced samples of 64 KiB, the first and the last among them. So a folder of
    60 GB takes well under a second, a model that was trained further or quantized differently is
    noticed, and a copy of the folder is the same model. Not noticed is a change of a few tensors
    that no sample meets: give such a model a new folder, or pin a commit on the hub.
    """
    digest = hashlib.sha256()
    for name in sorted(SMALL_FILES):
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            digest.update(f"{name}:{len(content)}:".encode() + content)
    for path, header in headers.items():
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            digest.update(file.read(header.size))
            for offset in _sample_offsets(header.size, size):
                digest.update(os.pread(file.fileno(), SAMPLE_BYTES, offset))
    return digest.hexdigest()


def _sample_offsets(start: int, end: int) -> list[int]:
    """Return where samples of [start, end) begin; together they cover a small range whole."""
    last = max(start, end - SAMPLE_BYTES)
    count = min(SAMPLES, 1 + math.ceil((last - start) / SAMPLE_BYTES))
    return [start + (last - start) * i // max(1, count - 1) for i in range(count)]


# ---- what can't work


def _no_such_folder(name: str, path: Path) -> ModelError:
    if path.is_file():
        hint = "give the folder that holds config.json, or a GGUF file"
        return ModelError(f"model.id {name!r} is a file", hint)
    return ModelError(
        f"model.id {name!r}: there is no such folder",
        f"relative paths begin at {Path.cwd()}{_nearest_folder(path)}",
    )


def _nearest_folder(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    found = path.parent.iterdir()
    siblings = [each.name for each in found if each.is_dir() or each.suffix == ".gguf"]
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
