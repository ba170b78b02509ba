"""Which matrices in 4 bits are multiplied by our kernel, and for how many rows: measured at load.

`fused_kernel.py` should be faster than bitsandbytes for some rows, and no formula knows for how
many, on which card, with which versions. So each shape of matrix that a model has is tried on the
card at hand, before any row: the kernel's products are compared with bitsandbytes', and both are
recorded in CUDA graphs, as decode steps are, and timed over several layers, so that no cache holds
what is read. For each range of rows the kernel has to be faster than bitsandbytes at both of its
ends.

All that goes wrong, and every doubt, leaves all layers as bitsandbytes made them: no Triton, an
error of its compiler, another result. A kernel that reads where it must not would end the process,
which nothing here can catch. `engine.fused_4bit: false` leaves all layers to bitsandbytes.

Where two ways are about as fast, two loads may choose differently, and answers then differ at
near-ties. Of a model that is spread over several cards, layers on the first alone are tried.

The kernel's workspace, for the sums of programs that divide K among them, is less than that of
bitsandbytes, which expands the same matrix (`four_bit.divisions`). So plans stay as they are.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import bitsandbytes
import torch

from quantbatch.weights.four_bit import LEAST_TILE, Packed, Tiles, divisions, packed_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    from torch import Tensor, nn

    Product: TypeAlias = Callable[[Tensor], Tensor]

logger = logging.getLogger(__name__)

RANGES = ((2, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, 128), (129, 256))
"""Rows that are decided together."""
GAIN = 1.05
"""How many times as fast the kernel has to be: below that, noise would decide."""
CLOSE = 0.01
"""Greatest distance between two products, as a share; in bfloat16 about 0.003 is rounding."""
CLOSE_LINE = 0.04
"""The same for each row and each column: a wrong scale of one block in 500 is more than that."""
READ_BYTES = 128 << 20
"""What is read between two products of one matrix: an H100's second-level cache has 50 MB."""
MOST_LAYERS = 16
REPETITIONS = 3
BUDGET_S = 30.0
"""Time, compiling included, after which no further shape is tried."""


class Shape(NamedTuple):
    """What makes layers take equally long."""

    n: int
    k: int
    block: int
    nested: bool
    kind: str
    dtype: torch.dtype
    bias: bool


class Layer(NamedTuple):
    """A layer that the kernel can multiply by."""

    module: Any
    """A `Linear4bit` of bitsandbytes."""
    plain: Product
    """Its own forward."""
    weights: Packed


def product(layer: Layer, x: Tensor, tiles: Tiles) -> Tensor:
    """Return a layer's output by the kernel, in the type of its input."""
    from quantbatch.weights import fused_kernel

    x_MK = x.reshape(-1, x.shape[-1]).to(layer.module.compute_dtype).contiguous()
    out_MN = fused_kernel.multiply(x_MK, layer.weights, layer.module.bias, tiles)
    return out_MN.view(*x.shape[:-1], -1).to(x.dtype)


@dataclass(frozen=True, slots=True)
class FusedForward:
    """What stands in for a layer's forward: the kernel where it was faster, else what was there.

    Args:
        layer: The layer.
        tiles: How to divide a product of so many rows; None where bitsandbytes is as fast.
        product: Multiplies.
    """

    layer: Layer
    tiles: Sequence[Tiles | None]
    product: Callable[[Layer, Tensor, Tiles], Tensor] = product

    def __call__(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        rows = x.numel() // x.shape[-1]
        tiles = self.tiles[rows] if rows < len(self.tiles) else None
        if tiles is None or x.requires_grad:
            return self.layer.plain(x)
        return self.product(self.layer, x, tiles)


def use_where_faster(model: nn.Module, *, budget_s: float = BUDGET_S) -> dict[Shape, list[int]]:
    """Let a model's layers on the current card use the kernel, where it is right and faster.

    Args:
        model: As it was loaded; its layers' forwards are replaced.
        budget_s: Time after which no further shape is tried.

    Returns:
        For each shape that was tried, the numbers of rows for which the kernel is used.
    """
    began = time.perf_counter()
    found: dict[Shape, list[Tiles | None]] = {}
    try:
        layers = _layers(model)
        for shape, alike in layers.items():
            if time.perf_counter() - began > budget_s:
                break
            found[shape] = _measured(alike, shape)
    except Exception as error:  # noqa: BLE001 - whatever a compiler or a driver does: then not
        said = str(error).strip().splitlines() or [""]
        message = "4-bit matrices stay with bitsandbytes, whatever engine.fused_4bit says: %s: %s"
        logger.warning(message, type(error).__name__, said[-1][:300])
        return {}
    for shape, tiles in found.items():
        for layer in layers[shape] if any(tiles) else ():
            layer.module.forward = FusedForward(layer, tiles)
    used = {s: [rows for rows, each in enumerate(tiles) if each] for s, tiles in found.items()}
    if layers:
        told = ", ".join(f"{s.n} x {s.k}: {spans(rows)}" for s, rows in used.items())
        took_s = time.perf_counter() - began
        logger.info("rows that our 4-bit kernel multiplies (%.1f s to find out): %s", took_s, told)
    return used


def spans(rows: Sequence[int]) -> str:
    """Return numbers as they are told: 9-32, 65-128."""
    spans = [f"{first}-{last}" for first, last in RANGES if last in rows]
    return " ".join(spans) or "none"


def _layers(model: nn.Module) -> dict[Shape, list[Layer]]:
    """Return the layers on the current card that the kernel takes, those read most first."""
    found: dict[Shape, list[Layer]] = defaultdict(list)
    modules = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    # Triton launches on the current card. Where accelerate moves inputs, it has replaced forwards.
    here = [m for m in modules if m.weight.is_cuda and "forward" not in vars(m)]
    for module in here:
        state = getattr(module.weight, "quant_state", None)
        if state is None or module.weight.device.index != torch.cuda.current_device():
            continue
        packed = packed_of(module.weight, state, module.compute_dtype)
        if packed is not None:
            n, k = packed.shape
            dtype, bias = module.compute_dtype, module.bias is not None
            shape = Shape(n, k, packed.block, state.nested, state.quant_type, dtype, bias)
            found[shape].append(Layer(module, module.forward, packed))
    return dict(sorted(found.items(), key=lambda each: -each[0].n * each[0].k * len(each[1])))


def decide(
    ours: Callable[[int], tuple[float, Tiles]], plain: Callable[[int], float]
) -> list[Tiles | None]:
    """Return how to divide a product of each number of rows; None where bitsandbytes is as fast.

    Args:
        ours: Measures the kernel with so many rows: its time, and the best division.
        plain: Measures bitsandbytes with so many rows.
    """
    found: list[Tiles | None] = [None] * (RANGES[-1][1] + 1)
    measured: dict[int, tuple[float, Tiles]] = {}
    for first, last in RANGES:
        rows = max(last, LEAST_TILE)
        if rows not in measured:
            measured[rows] = ours(rows)
        took_s, tiles = measured[rows]
        if GAIN * took_s < min(plain(first), plain(last)):
            found[first : last + 1] = [tiles] * (last + 1 - first)
    return found


@torch.inference_mode()
def _measured(alike: Sequence[Layer], shape: Shape) -> list[Tiles | None]:
    timed = alike[: layers_to_time(shape)]
    processors = torch.cuda.get_device_properties().multi_processor_count

    def ours(rows: int) -> tuple[float, Tiles]:
        tried = divisions(shape.n, shape.k, shape.block, rows, processors=processors)
        return min((fused_seconds(timed, shape, rows, tiles), tiles) for tiles in tried)

    return decide(ours, lambda rows: plain_seconds(timed, shape, rows))


def layers_to_time(shape: Shape) -> int:
    """Return how many layers no cache holds."""
    return min(MOST_LAYERS, -(-READ_BYTES // (shape.n * shape.k // 2)))


def plain_seconds(timed: Sequence[Layer], shape: Shape, rows: int) -> float:
    """Return the time of one of bitsandbytes' products of so many rows."""
    return seconds([layer.plain for layer in timed], activations(shape, rows))


def fused_seconds(timed: Sequence[Layer], shape: Shape, rows: int, tiles: Tiles) -> float:
    """Return the time of one of the kernel's products of so many rows.

    Raises:
        ArithmeticError: The product is not bitsandbytes'.
    """
    x_MK = activations(shape, rows)
    if not close(product(timed[0], x_MK, tiles), timed[0].plain(x_MK)):
        raise ArithmeticError(f"{shape.n} x {shape.k} by {rows} rows differs in {tiles}")
    return seconds([functools.partial(product, each, tiles=tiles) for each in timed], x_MK)


def activations(shape: Shape, rows: int) -> Tensor:
    """Return random activations, the same each time."""
    random = torch.Generator("cuda").manual_seed(rows)
    return torch.randn(rows, shape.k, dtype=shape.dtype, device="cuda", generator=random)


def close(got_MN: Tensor, wanted_MN: Tensor) -> bool:
    """Tell whether two products are the same but for rounding, on the whole and line by line."""
    wanted_MN = wanted_MN.float()
    apart_MN = got_MN.float() - wanted_MN
    if not float(apart_MN.norm()) <= CLOSE * float(wanted_MN.norm()):
        return False
    lines = [(apart_MN.norm(dim=d), wanted_MN.norm(dim=d)) for d in (0, 1)]
    return all(bool((a <= CLOSE_LINE * w.clamp(min=w.mean())).all()) for a, w in lines)


@functools.cache
def _side_stream(device: int) -> Any:  # noqa: ANN401 - torch ships no types for it
    """Return the one stream of a device that recordings are made on.

    A new one each time would leave 32 MiB with each: cuBLAS keeps a workspace for every stream.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def seconds(products: Sequence[Product], x_MK: Tensor) -> float:
    """Return the mean time of some products, recorded and replayed one after the other."""
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for each in products:  # compiles what the recording calls
            each(x_MK)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for each in products:
            each(x_MK)
    begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    times: list[float] = []
    for _ in range(1 + REPETITIONS):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    # Or each recording would keep its memory beside the next one's.
    del graph
    torch.cuda.empty_cache()
    return min(times[1:]) / len(products)
