"""What of a model can't work, told before anybody waits for a card."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from quantbatch.errors import ModelError
from quantbatch.model import formats, packed
from quantbatch.model.formats import How, stored_quantization
from quantbatch.model.headers import few, read_json
from quantbatch.spec import FourBit, Int8, Unquantized

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.model.formats import Verdict
    from quantbatch.spec import Model, Quantization

_IMPLEMENTATIONS = ("_implementation", "_implementation_internal")
"""How fields of config.json end that say which function computes attention or experts."""
CAUSAL_ARCHITECTURES = frozenset({"GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "CTRLLMHeadModel"})
"""Causal language models whose class is not called ...ForCausalLM."""


def refuse_foreign_code(checkpoint: Checkpoint) -> None:
    """Refuse a model that needs code which may not run, or that nobody has pinned."""
    _refuse_kernels(checkpoint)
    if checkpoint.trusted:
        _refuse_unpinned_code(checkpoint)
        return
    if "AutoModelForCausalLM" in (checkpoint.config.get("auto_map") or {}) and not (
        checkpoint.is_native
    ):
        pinned = f"model.revision: {checkpoint.commit or 'the commit that you read'}"
        raise ModelError(
            f"{checkpoint.id} needs Python code of its own: transformers has no model type"
            f" {checkpoint.config.get('model_type')!r}",
            "a newer transformers may know the model; or read the code, and set"
            f" model.trust_remote_code: true and {pinned}"
            f"{'' if checkpoint.commit else ', with model.id as the name of a repository'}",
        )


def _refuse_kernels(checkpoint: Checkpoint) -> None:
    """Refuse a function that config.json takes from a repository, which transformers would fetch
    and run without asking if the package `kernels` is there (CVE-2026-4372 before 5.3).
    """
    parts = [checkpoint.config, *(c for c in checkpoint.config.values() if isinstance(c, dict))]
    for part in parts:
        for name, value in part.items():
            if name.endswith(_IMPLEMENTATIONS) and "/" in str(value):
                raise ModelError(
                    f"config.json of {checkpoint.id} takes code from elsewhere: {name} is"
                    f" {str(value)[:200]!r}",
                    f"remove {name} from config.json: quantbatch chooses it itself",
                )


def _refuse_unpinned_code(checkpoint: Checkpoint) -> None:
    """Refuse code that `auto_map` takes from another repository: `repository--module.Class`."""
    tokenizer = checkpoint.folder / "tokenizer_config.json"
    configs = [checkpoint.config, read_json(tokenizer) if tokenizer.is_file() else {}]
    for place in (place for config in configs for place in _places(config.get("auto_map"))):
        repository, elsewhere, _ = place.partition("--")
        if elsewhere and repository != checkpoint.id:
            raise ModelError(
                f"{checkpoint.id} takes code from another repository, {place}: model.revision does"
                " not pin that",
                "copy the code into a repository of yours, beside the model",
            )


def _places(auto_map: object) -> Iterator[str]:
    """Yield all places of code in an `auto_map`; a tokenizer has two, of which one may be null."""
    match auto_map:
        case str():
            yield auto_map
        case dict():
            yield from (place for each in auto_map.values() for place in _places(each))
        case list():
            yield from (place for each in auto_map for place in _places(each))
        case _:
            pass


def is_native(model_type: str) -> bool:
    """Tell whether the installed transformers has a folder for a model type, without importing it
    (which takes seconds).
    """
    found = importlib.util.find_spec("transformers")
    roots = (found and found.submodule_search_locations) or []
    folder = model_type.replace("-", "_").removesuffix("_text")
    return any((Path(root) / "models" / folder).is_dir() for root in roots)


def refuse_other_tasks(checkpoint: Checkpoint) -> None:
    """Refuse what is no causal language model."""
    names = [str(name) for name in checkpoint.config.get("architectures") or []]
    if not any(name.endswith("ForCausalLM") or name in CAUSAL_ARCHITECTURES for name in names):
        raise ModelError(
            f"{checkpoint.id} is no causal language model: its architectures are"
            f" {', '.join(names) or 'not given'}",
            "quantbatch runs models whose config.json names an architecture like LlamaForCausalLM",
        )


def refuse_format(checkpoint: Checkpoint, model: Model, found: Verdict) -> None:
    """Refuse what can't be loaded here, or not without taking more than the job allows."""
    problem = f"{checkpoint.id} is quantized with {checkpoint.quantized}"
    match found.how:
        case How.REFUSED:
            raise ModelError(f"{problem} and can't be loaded here: {found.reason}", found.remedy)
        case How.EXPANDED if not model.allow_dequantize:
            raise ModelError(f"{problem}: {found.reason}", formats.ALLOW)
        case How.EXPANDED | How.AS_IS:
            pass


def refuse_codes_without_scales(checkpoint: Checkpoint) -> None:
    """Refuse codes that transformers would take for weights."""
    alone = (
        list(packed.without_partner(checkpoint)) if checkpoint.quantized in packed.PAIRED else []
    )
    if alone:
        raise ModelError(
            f"{checkpoint.id} has codes without scales, or scales without codes: {few(alone)}",
            "config.json and weights do not belong together: fetch the model again",
        )
    names = [tensor.name for tensor in checkpoint.tensors]
    if checkpoint.quantized == "bitsandbytes" and not any(map(packed.is_scale, names)):
        raise ModelError(
            f"config.json of {checkpoint.id} says that bitsandbytes quantized its weights, but none"
            " of them has a scale",
            "if they are the original ones, remove quantization_config: quantbatch quantizes them"
            " as it loads (model.bits)",
        )


def refuse_other_quantization(checkpoint: Checkpoint, model: Model) -> None:
    """Refuse to quantize what is quantized already, unless the spec asks for just what is there."""
    if model.bits == "auto":
        return
    asked = model.resolved().quantization
    assert asked is not None
    if isinstance(asked, Unquantized) and (model.bits is None or checkpoint.expanded):
        return
    stored = stored_quantization(checkpoint.config)
    if stored is None or _scheme(stored) != _scheme(asked):
        there = _scheme(stored) if stored else checkpoint.quantized
        wanted = f"{model.bits} bits ({_scheme(asked)})" if model.bits else _scheme(asked)
        raise ModelError(
            f"{checkpoint.id} is quantized already ({there}), but the job asks for {wanted}",
            "leave out model.bits and model.quantization to load it as it is, or give the original"
            " model",
        )


def _scheme(quantization: Quantization) -> str:
    """Name what of a quantization is in the weights; compute type and skip list are not."""
    match quantization:
        case Unquantized():
            return "no quantization"
        case Int8():
            return "bitsandbytes int8"
        case FourBit(kind=kind, double_quant=double_quant):
            return f"bitsandbytes {kind}{' with double quantization' if double_quant else ''}"
