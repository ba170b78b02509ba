"""Our kernel for few rows by matrices in 4 bits, against bitsandbytes and against bf16.

First each distinct matrix of some models, by itself: all three are recorded in CUDA graphs, over so
many copies that no cache holds them. The floor is the time in which the card copies as many bytes
as codes, scales, activations and output have. Then decode steps of a model, as bitsandbytes
multiplies and with the kernel where `quantbatch.weights.fused` finds it faster, as a replica does
when it loads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import bitsandbytes
import torch

from jobs.gpubench import engines, floor
from jobs.gpubench.engines import on_card, wait_for
from jobs.gpubench.record import GIB, Record
from jobs.gpubench.shapes import KINDS, build, describe
from quantbatch.spec import FourBit, Model
from quantbatch.weights import fused
from quantbatch.weights.four_bit import LEAST_TILE, Tiles, divisions, packed_of

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class _Matrix(NamedTuple):
    shape: fused.Shape
    layers: list[fused.Layer]
    plain: list[torch.Tensor]
    """In bfloat16."""
    packed_bytes: int
    """Codes and scales."""


def measure(
    record: Record, shapes: Sequence[str], kind: str, batch_sizes: Sequence[int], *, steps: int
) -> None:
    """Measure the device, the matrices of each shape, and decode steps of the first."""
    rates = floor.measure_rates(record.device)
    record.add(copy_gb_per_s=round(rates.copy_bytes_per_s / 1e9, 1))
    _decoding(record, shapes[0], kind, batch_sizes, steps, rates)
    for shape in shapes:
        for n, k in _sizes(shape):
            if record.has_time():
                _products(record, shape, _matrix(n, k, kind, record.device), rates)
                engines.free(record.device)
            else:
                record.skip(shape=shape, n=n, k=k)


def _sizes(shape: str) -> list[tuple[int, int]]:
    """Return the distinct matrices of a layer, N and K, the largest first."""
    layer = [t for t in describe(shape).tensors if ".layers.0." in t.name and len(t.shape) == 2]
    found = {(tensor.shape[0], tensor.shape[1]) for tensor in layer}
    return sorted(found, key=lambda size: -size[0] * size[1])


def _matrix(n: int, k: int, kind: str, device: str) -> _Matrix:
    """Make copies of a random matrix, enough that a cache does not hold them."""
    quantization = Model.model_validate({"id": "random", **KINDS[kind]}).resolved().quantization
    assert isinstance(quantization, FourBit)
    weight = torch.randn(n, k, dtype=torch.bfloat16, device=device)
    nested = quantization.double_quant
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=nested, quant_type=quantization.kind
    )
    shape = fused.Shape(n, k, 64, nested, quantization.kind, torch.bfloat16, bias=False)
    layers = []
    for _ in range(fused.layers_to_time(shape) if on_card(device) else 1):
        module = bitsandbytes.nn.Linear4bit(
            k,
            n,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type=quantization.kind,
            device="meta",
        )
        module.weight = bitsandbytes.nn.Params4bit(
            packed.clone(),
            requires_grad=False,
            quant_state=state,
            bnb_quantized=True,
            module=module,
        )
        module.support_avx512bf16_for_cpu = False
        found = packed_of(module.weight, state, torch.bfloat16)
        assert found is not None
        layers.append(fused.Layer(module, module.forward, found))
    scale_bytes = state.absmax.numel() * state.absmax.element_size()
    copies = max(1, min(len(layers), -(-fused.READ_BYTES // (2 * n * k))))
    return _Matrix(shape, layers, [weight.clone() for _ in range(copies)], n * k // 2 + scale_bytes)


@torch.inference_mode()
def _products(record: Record, shape: str, matrix: _Matrix, rates: floor.Rates) -> None:
    """Time products of each number of rows; the kernel's division is the best of its tile."""
    n, k, *_ = matrix.shape
    best: dict[int, tuple[float, Tiles]] = {}
    for rows in ROWS:
        x = torch.randn(rows, k, dtype=torch.bfloat16, device=record.device)
        theirs = [layer.plain for layer in matrix.layers]
        # Bound now: each stands for a matrix of its own.
        plain = [lambda x, weight=w: torch.nn.functional.linear(x, weight) for w in matrix.plain]
        took_s = {"bitsandbytes": _seconds(theirs, x), "bf16": _seconds(plain, x)}
        tiles = None
        if on_card(record.device) and rows <= fused.RANGES[-1][1]:
            took_s["ours"], tiles = _ours(matrix, rows, best)
        moved = matrix.packed_bytes + 2 * rows * (n + k)
        floor_s = moved / rates.copy_bytes_per_s
        record.add(
            shape=shape,
            n=n,
            k=k,
            rows=rows,
            tiles=tiles,
            floor_us=round(1e6 * floor_s, 2),
            **{f"{name}_us": round(1e6 * each, 2) for name, each in took_s.items()},
            **{f"{name}_of_floor": round(floor_s / each, 3) for name, each in took_s.items()},
        )


def _ours(matrix: _Matrix, rows: int, best: dict[int, tuple[float, Tiles]]) -> tuple[float, Tiles]:
    n, k, *_ = matrix.shape
    measured = max(rows, LEAST_TILE)
    if measured not in best:
        processors = torch.cuda.get_device_properties().multi_processor_count
        best[measured] = min(
            (fused.fused_seconds(matrix.layers, matrix.shape, measured, each), each)
            for each in divisions(n, k, matrix.shape.block, measured, processors=processors)
        )
    tiles = best[measured][1]
    return fused.fused_seconds(matrix.layers, matrix.shape, rows, tiles), tiles


def _seconds(products: Sequence[Any], x: torch.Tensor) -> float:
    if x.is_cuda:
        return fused.seconds(products, x)
    began = time.perf_counter()
    for each in products:
        each(x)
    return (time.perf_counter() - began) / len(products)


def _decoding(
    record: Record,
    shape: str,
    kind: str,
    batch_sizes: Sequence[int],
    steps: int,
    rates: floor.Rates,
) -> None:
    """Time decode steps as bitsandbytes multiplies, and then with the kernel."""
    built = build(shape, kind, record.device)
    engines.free(record.device)
    for on in (False, True):
        if on:
            began = time.perf_counter()
            used = fused.use_where_faster(built.model)
            wait_for(record.device)
            took_s = round(time.perf_counter() - began, 2)
            kept = {f"{each.n} x {each.k}": fused.spans(rows) for each, rows in used.items()}
            record.add(shape=shape, kind=kind, ours_for_rows=kept, found_out_s=took_s)
        for rows in batch_sizes:
            if not record.has_time():
                record.skip(shape=shape, rows=rows, ours=on)
                continue
            if on_card(record.device):
                torch.cuda.reset_peak_memory_stats()
            found = floor.decode_step(built, record.device, rows, steps, rates)
            if on_card(record.device):
                found["peak_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 2)
            record.add(shape=shape, kind=kind, ours=on, rows=rows, **found)
    del built
    engines.free(record.device)
