"""Loading a model as a job asks: at 4 or 8 bits, or as it is."""

from __future__ import annotations

import copy
import functools
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from quantbatch.model.footprint import weigh
from quantbatch.model.headers import shard_names
from quantbatch.model.sizes import gib
from quantbatch.spec import FourBit, Int8
from quantbatch.weights import bnb, packed, placement, pretrained, turns
from quantbatch.weights.cache import Found, WeightCache
from quantbatch.weights.dtypes import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.spec import Model

logger = logging.getLogger(__name__)


class LoadedModel(NamedTuple):
    """A model in memory, ready for inference."""

    model: PreTrainedModel
    device: str
    compute_dtype: str
    """Type that matrices are multiplied in: `bfloat16`, `float16` or `float32`."""
    weight_bytes: int
    """What its parameters take, the scales of quantized ones included."""


def load(
    checkpoint: Checkpoint, model: Model, device: str, *, card_layers: Sequence[int] = ()
) -> LoadedModel:
    """Load a model onto a device.

    Args:
        checkpoint: The model's files.
        model: How to load it; types that are `auto` are chosen for the device, see `resolve`.
        device: `cpu`, `cuda` or `cuda:<number>`.
        card_layers: How many layers go to each of several cards, all that are visible.

    Raises:
        ModelError: The files don't make the model that the configuration describes.
        DoesNotFit: The weights alone are more than the device has room for.
    """
    model = resolve(checkpoint, model, device)
    assert model.dtype != "auto"
    config = pretrained.load_config(checkpoint)
    packed.prepare(checkpoint, config)
    read = functools.partial(
        pretrained.load_pretrained,
        checkpoint,
        dtype=model.dtype,
        device=device,
        device_map=placement.place(config, card_layers) if card_layers else None,
    )
    if checkpoint.quantized is None and isinstance(model.quantization, Int8 | FourBit):
        loaded = _quantized(checkpoint, config, model, device, read)
    else:
        WeightCache.of(checkpoint, model, device)  # says that it has no use for one
        with turns.turn(checkpoint.digest, lambda: weight_files(checkpoint)):
            loaded = read(config)
    if checkpoint.expanded:
        packed.settle_dtype(loaded, getattr(torch, model.dtype))
    compute_dtype = bnb.settle_four_bit_layers(loaded, model, device)
    weight_bytes = bnb.parameter_bytes(loaded) + packed.buffer_bytes(loaded)
    _compare_with_plan(weight_bytes, checkpoint, model)
    return LoadedModel(loaded, device, compute_dtype, weight_bytes)


def _quantized(
    checkpoint: Checkpoint,
    config: Any,  # noqa: ANN401
    model: Model,
    device: str,
    read: Callable[..., PreTrainedModel],
) -> PreTrainedModel:
    """Load quantized weights from the cache, or quantize as they are loaded and fill the cache."""
    assert isinstance(model.quantization, Int8 | FourBit)
    options = bnb.quantization_config(model.quantization, config)
    cache = WeightCache.of(checkpoint, model, device)
    stored_config = copy.deepcopy(config)
    stored_config.quantization_config = options.to_dict()

    waits_for_cache = cache is not None and cache.is_filled_here

    def files() -> list[Path]:
        found = cache.files() if cache else []
        return found if found or waits_for_cache else weight_files(checkpoint)

    found = Found(None)
    with turns.turn(checkpoint.digest, files):
        if cache:
            found = cache.load(lambda folder: read(stored_config, folder=folder))
        loaded = found.model or read(config, quantization_config=options)
        if cache and found.version and waits_for_cache:
            cache.keep(loaded, found.version)
    if cache and found.version and not waits_for_cache:
        cache.keep(loaded, found.version)
    return loaded


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """Return the files of a checkpoint's weights, which may not have been fetched yet."""
    names = [checkpoint.gguf] if checkpoint.gguf else shard_names(checkpoint.folder)
    return [checkpoint.folder / name for name in names]


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
