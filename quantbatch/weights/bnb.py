"""Loading a model with bitsandbytes: at 4 or 8 bits, or as it is.

transformers' loading is used as it is, with nothing left to its defaults, because these are wrong
for us and silent: fp4 with float32 compute for 4 bits, a skip list that replaces the library's and
so quantizes the output head, weights from pickles, code from the repository, and tensors that the
checkpoint lacks made up at random. The loading report must be clean, else the model is refused.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import bitsandbytes
import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.quantizers.base import get_keys_to_not_convert

from quantbatch.errors import DoesNotFit, ModelError
from quantbatch.model.footprint import DType, weigh, weight_dtype
from quantbatch.model.headers import few
from quantbatch.model.memory import gib
from quantbatch.spec import FourBit, Int8, Unquantized

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.spec import Model

logger = logging.getLogger(__name__)

# Most of what is called of it has no types, or wrong ones (5.23).
hf: Any = transformers

BFLOAT16_CPU_FLAGS = ("avx512_bf16", "amx_bf16")
LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


class LoadedModel(NamedTuple):
    """A model in memory, ready for inference."""

    model: PreTrainedModel
    device: str
    compute_dtype: str
    """Type that matrices are multiplied in: `bfloat16`, `float16` or `float32`."""
    weight_bytes: int
    """What its parameters take, the scales of quantized ones included."""


def load(checkpoint: Checkpoint, model: Model, device: str) -> LoadedModel:
    """Load a model onto a device.

    Args:
        checkpoint: The model's files.
        model: How to load it; types that are `auto` are chosen for the device, see `resolve`.
        device: `cpu`, `cuda` or `cuda:<number>`.

    Raises:
        ModelError: The files don't make the model that the configuration describes.
        DoesNotFit: The weights alone are more than the device has room for.
    """
    model = resolve(checkpoint, model, device)
    loaded = _from_pretrained(checkpoint, model, device)
    loaded.requires_grad_(requires_grad=False)
    compute_dtype = _settle_four_bit_layers(loaded, model, device)
    _neutralize_generation_config(loaded)
    weight_bytes = parameter_bytes(loaded)
    _compare_with_plan(weight_bytes, checkpoint, model)
    return LoadedModel(loaded, device, compute_dtype, weight_bytes)


def resolve(checkpoint: Checkpoint, model: Model, device: str) -> Model:
    """Return the model's section with its types chosen for a device.

    A checkpoint in bfloat16 is loaded as float16 on a card without bfloat16 (before Ampere). On a
    CPU, 16 bits are kept only where it multiplies bfloat16 itself: elsewhere bfloat16 is 4 times
    slower than float32 (measured).
    """
    model = model.resolved()
    own, fast = weight_dtype(checkpoint, model), _fast_dtype(device)
    if model.dtype == "auto" and own not in ("float32", fast):
        own = "float32" if device == "cpu" else "float16"
    quantization = model.quantization
    if isinstance(quantization, FourBit) and quantization.compute_dtype == "auto":
        quantization = quantization.model_copy(update={"compute_dtype": fast})
    return model.model_copy(update={"dtype": own, "quantization": quantization})


def _fast_dtype(device: str) -> DType:
    """Return the type that a device multiplies fastest in, with the range of bfloat16 if it can."""
    if device == "cpu":
        flags = torch.cpu.get_capabilities()
        return "bfloat16" if any(flags.get(name) for name in BFLOAT16_CPU_FLAGS) else "float32"
    with torch.cuda.device(device):
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_bfloat16 else "float16"


def _from_pretrained(checkpoint: Checkpoint, model: Model, device: str) -> PreTrainedModel:
    source = _source(checkpoint)
    try:
        with _quiet():
            config = hf.AutoConfig.from_pretrained(**source, trust_remote_code=False)
            loaded, report = hf.AutoModelForCausalLM.from_pretrained(
                **source,
                **_quantization_arguments(checkpoint, model, config),
                dtype=getattr(torch, model.dtype),
                device_map={"": device},
                attn_implementation=_attention(config),
                use_safetensors=True,
                trust_remote_code=False,  # None would ask on stdin
                output_loading_info=True,
                # Mismatches are refused below, with their names.
                ignore_mismatched_sizes=True,
            )
    except torch.OutOfMemoryError as error:
        raise _does_not_fit(checkpoint, device, error) from error
    except LOADING_ERRORS as error:
        if "can't allocate memory" in str(error):
            raise _does_not_fit(checkpoint, device, error) from error
        raise ModelError(
            f"{checkpoint.id} can't be loaded: {type(error).__name__}: {error}"
        ) from error
    _refuse_unclean(checkpoint, report)
    assert isinstance(loaded, PreTrainedModel)
    return loaded


def _source(checkpoint: Checkpoint) -> dict[str, Any]:
    if not checkpoint.commit:
        folder = str(checkpoint.folder)
        return {"pretrained_model_name_or_path": folder, "local_files_only": True}
    return {"pretrained_model_name_or_path": checkpoint.id, "revision": checkpoint.commit}


def _attention(config: Any) -> str:  # noqa: ANN401
    """Return the attention function: SDPA, or the plain one for the models that lack it (Gemma 2).

    Left open, it could be named by config.json, and be code to download from the hub.
    """
    model_class = hf.AutoModelForCausalLM._model_mapping[type(config)]
    return "sdpa" if model_class._supports_sdpa else "eager"


def _quantization_arguments(
    checkpoint: Checkpoint,
    model: Model,
    config: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """Return `quantization_config`, or nothing: None as its value makes transformers load a
    quantized checkpoint as random or raw numbers, without an error (5.23, measured).
    """
    quantization = model.quantization
    if checkpoint.quantized is not None or isinstance(quantization, Unquantized | None):
        return {}
    skip_modules = _skip_modules(config, quantization.skip_modules)
    eight, four = Int8(), FourBit()
    match quantization:
        case Int8():
            eight = quantization
        case FourBit():
            four = quantization
    arguments = hf.BitsAndBytesConfig(
        load_in_8bit=isinstance(quantization, Int8),
        load_in_4bit=isinstance(quantization, FourBit),
        llm_int8_threshold=eight.threshold,
        llm_int8_skip_modules=skip_modules,
        llm_int8_enable_fp32_cpu_offload=False,
        llm_int8_has_fp16_weight=False,
        bnb_4bit_quant_type=four.kind,
        bnb_4bit_use_double_quant=four.double_quant,
        bnb_4bit_compute_dtype=None if four.compute_dtype == "auto" else four.compute_dtype,
        bnb_4bit_quant_storage="uint8",
    )
    return {"quantization_config": arguments}


def _skip_modules(config: Any, own: list[str]) -> list[str] | None:  # noqa: ANN401
    """Return what not to quantize: the library's list and the user's.

    A list that is given replaces the library's, and with it the output head would be quantized,
    which tripled the divergence (measured).
    """
    if not own:
        return None  # the library's own
    with torch.device("meta"):
        empty = hf.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return sorted({*get_keys_to_not_convert(empty), *own})


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


def _settle_four_bit_layers(loaded: PreTrainedModel, model: Model, device: str) -> str:
    """Make 4-bit layers compute in the type that the spec says, and keep their weights as loaded.

    A checkpoint that was saved quantized brings its own compute type, which transformers prefers to
    the one asked for. And on CPUs with AVX512-BF16, bitsandbytes 0.50 would repack each matrix at
    its first use. That is off, though it is 2.5 times faster for up to 16 rows (1.5 for 32, nothing
    from 64 on): it ignores the compute type, undoes double quantization, takes 6 bytes for each
    element of a matrix while it works, and fails on matrices whose height is no multiple of 32.

    Returns:
        The compute type of the model.
    """
    layers = [m for m in loaded.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    if not layers:
        return model.dtype
    quantization = model.quantization
    asked = quantization.compute_dtype if isinstance(quantization, FourBit) else "auto"
    compute_dtype = _fast_dtype(device) if asked == "auto" else asked
    for layer in layers:
        layer.compute_dtype = getattr(torch, compute_dtype)
        layer.compute_type_is_set = True
        layer.support_avx512bf16_for_cpu = False
    return compute_dtype


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


def parameter_bytes(loaded: torch.nn.Module) -> int:
    """Return what a model's parameters take, the scales and tables of quantized ones included."""
    return sum(_tensor_bytes(tensor) for tensor in _parameter_tensors(loaded))


def _parameter_tensors(loaded: torch.nn.Module) -> Iterator[torch.Tensor]:
    for parameter in loaded.parameters():
        yield parameter
        if isinstance(parameter, bitsandbytes.nn.Int8Params):
            yield parameter.SCB
        elif isinstance(parameter, bitsandbytes.nn.Params4bit):
            state = parameter.quant_state
            yield from (state.absmax, state.code)
            if state.nested:
                yield from (state.offset, state.state2.absmax, state.state2.code)


def _tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _compare_with_plan(weight_bytes: int, checkpoint: Checkpoint, model: Model) -> None:
    """Say so if a model has layers that the plan took for others: it knows them by name only."""
    planned = weigh(checkpoint, model).total_bytes
    if weight_bytes > 1.01 * planned:
        logger.warning(
            "the weights of %s take %s, %s were planned",
            checkpoint.id,
            gib(weight_bytes),
            gib(planned),
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
