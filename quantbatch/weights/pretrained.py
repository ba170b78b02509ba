"""transformers' `from_pretrained`, with nothing left to its defaults.

These are silent: weights from pickles, code from the repository, and tensors that the checkpoint
lacks made up at random. The loading report must be clean, else the model is refused.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from quantbatch.errors import DoesNotFit, ModelError
from quantbatch.model.headers import few
from quantbatch.weights.heap import lean_heap
from quantbatch.weights.unmapped import unmapped_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from quantbatch.model.checkpoint import Checkpoint

# Most of what is called of it has no types, or wrong ones (5.23).
hf: Any = transformers

AUTO = "AutoModelForCausalLM"
LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


def load_config(checkpoint: Checkpoint) -> Any:  # noqa: ANN401
    """Return the configuration of a model, as transformers has it.

    Raises:
        ModelError: transformers can't read it.
    """
    with _explained(checkpoint, "cpu"), quiet():
        config = hf.AutoConfig.from_pretrained(**_source(checkpoint), **trust(checkpoint))
    config._commit_hash = checkpoint.commit or None
    return config


def trust(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the arguments that tell transformers whether code of a repository may run."""
    if not checkpoint.trusted:
        return {"trust_remote_code": False}  # None would ask on stdin
    return {"trust_remote_code": True, "code_revision": checkpoint.commit}


def empty_model(config: Any) -> Any:  # noqa: ANN401
    """Build a model without weights, to look at its modules.

    Args:
        config: What `load_config` returned. If it is of a class of the repository, that is trusted.
    """
    trusted = type(config).__module__.startswith("transformers_modules.")
    arguments = {"code_revision": config._commit_hash} if trusted else {}
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(config, trust_remote_code=trusted, **arguments)


def load_pretrained(
    checkpoint: Checkpoint,
    config: Any,  # noqa: ANN401
    *,
    dtype: str,
    device: str,
    device_map: Mapping[str, str | int] | None = None,
    folder: Path | None = None,
    **arguments: Any,  # noqa: ANN401
) -> PreTrainedModel:
    """Load a model, all of it and nothing else.

    Args:
        checkpoint: The model's files.
        config: What `load_config` returned.
        dtype: Type of the weights that are not quantized.
        device: Where to.
        device_map: Or where each module goes to; see `placement`.
        folder: Holds the weights instead of the checkpoint's own folder.
        arguments: More for `from_pretrained`. Leave out `quantization_config` rather than pass
            None, which makes transformers load a quantized checkpoint as random or raw numbers,
            without an error (5.23, measured).

    Raises:
        ModelError: The files don't make the model that the configuration describes.
        DoesNotFit: The weights alone are more than the device has room for.
    """
    assert arguments.get("quantization_config", arguments) is not None
    source = _source(checkpoint) if folder is None else _folder(folder)
    quantizing = "quantization_config" in arguments
    reading = unmapped_files() if quantizing else contextlib.nullcontext()
    with _explained(checkpoint, device), quiet(), lean_heap(), reading:
        loaded, report = hf.AutoModelForCausalLM.from_pretrained(
            **source,
            **arguments,
            config=config,
            dtype=getattr(torch, dtype),
            device_map=dict(device_map or {"": device}),
            attn_implementation=_attention(checkpoint, config),
            use_safetensors=True,
            **trust(checkpoint),
            output_loading_info=True,
            # Mismatches are refused below, with their names.
            ignore_mismatched_sizes=True,
        )
    _refuse_unclean(checkpoint, report)
    assert isinstance(loaded, PreTrainedModel)
    _neutralize_generation_config(loaded)
    loaded.requires_grad_(requires_grad=False)
    return loaded


@contextlib.contextmanager
def _explained(checkpoint: Checkpoint, device: str) -> Iterator[None]:
    """Turn what goes wrong in transformers into an error of the job."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise _does_not_fit(checkpoint, device, error) from error
    except LOADING_ERRORS as error:
        if "can't allocate memory" in str(error):
            raise _does_not_fit(checkpoint, device, error) from error
        raise ModelError(
            f"{checkpoint.id} can't be loaded: {type(error).__name__}: {error}"
        ) from error


def _source(checkpoint: Checkpoint) -> dict[str, Any]:
    file = {"gguf_file": checkpoint.gguf} if checkpoint.gguf else {}
    if not checkpoint.commit:
        return _folder(checkpoint.folder) | file
    return {"pretrained_model_name_or_path": checkpoint.id, "revision": checkpoint.commit} | file


def _folder(folder: Path) -> dict[str, Any]:
    return {"pretrained_model_name_or_path": str(folder), "local_files_only": True}


def _attention(checkpoint: Checkpoint, config: Any) -> str:  # noqa: ANN401
    """Return the attention function: SDPA, or the plain one for the models that lack it (Gemma 2).

    Left open, it could be named by config.json, and be code to download from the hub.
    """
    model_class: Any
    if checkpoint.trusted and (place := (getattr(config, "auto_map", None) or {}).get(AUTO)):
        model_class = get_class_from_dynamic_module(
            place, checkpoint.id, revision=checkpoint.commit, code_revision=checkpoint.commit
        )
    else:
        model_class = hf.AutoModelForCausalLM._model_mapping[type(config)]
    return "sdpa" if model_class._supports_sdpa else "eager"


def _refuse_unclean(checkpoint: Checkpoint, report: Mapping[str, Any]) -> None:
    """Refuse a model of which parts were made up, left over or cut to size."""
    mismatched = [
        f"{name} ({there} not {wanted})" for name, there, wanted in report["mismatched_keys"]
    ]
    for names, words in (
        (report["missing_keys"], "lacks"),
        (mismatched, "has in another shape"),
        (report["unexpected_keys"], "has, unexpectedly,"),
        (report["error_msgs"], "could not be loaded:"),
    ):
        if names:
            raise ModelError(
                f"{checkpoint.id} {words} {few(names)}",
                "config.json and weights do not belong together: with such a model, transformers"
                " would go on with random numbers",
            )


def _does_not_fit(checkpoint: Checkpoint, device: str, error: Exception) -> DoesNotFit:
    return DoesNotFit(
        f"the weights of {checkpoint.id} do not fit {device}: {error}",
        "another process may use the device; fewer model.bits take less",
    )


def _neutralize_generation_config(loaded: PreTrainedModel) -> None:
    """Forget what the model's files say on sampling; only which tokens begin, end and pad is left.

    transformers fills every field that a request leaves open from there.
    """
    found, config = loaded.generation_config, loaded.config.get_text_config()
    tokens = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        chosen = getattr(found, name)
        tokens[name] = getattr(config, name) if chosen is None else chosen
    loaded.generation_config = hf.GenerationConfig(**tokens)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bar, its table of a load's troubles, which we tell ourselves, and
    its advice on sharding out of the logs.
    """
    library = logging.getLogger("transformers")
    level, had_bar = library.level, hf.logging.is_progress_bar_enabled()
    library.setLevel(logging.ERROR)
    hf.logging.disable_progress_bar()
    try:
        yield
    finally:
        library.setLevel(level)
        if had_bar:
            hf.logging.enable_progress_bar()
