"""Loading from the cache of quantized weights against quantizing as a model is loaded.

The 16-bit checkpoint is written to the local disk first. Each way is taken with the files in the
page cache of the machine, and without where that can be emptied: not in a rehearsal on a CPU, which
may share its machine.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from jobs.gpubench import engines, shapes
from jobs.gpubench.record import GIB, Record
from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.spec import Model, Unquantized
from quantbatch.weights import dtypes, peak
from quantbatch.weights import loading as weights

DROP = Path("/proc/sys/vm/drop_caches")


def measure(record: Record, shape: str, kinds: list[str], folder: Path, *, passes: int) -> None:
    """Write the checkpoint and load it in all ways."""
    device, checkpoint = record.device, folder / shape
    if not (checkpoint / "config.json").exists():
        with record.timed(f"write {shape} in 16 bits"):
            shapes.write(checkpoint, shape, device)
    for kind in kinds:
        plain = Model.model_validate({"id": str(checkpoint), **shapes.KINDS[kind]})
        cached = plain.model_copy(update={"cache": str(folder / "cache")})
        quantized = not isinstance(plain.resolved().quantization, Unquantized)
        _load(record, cached, kind, "quantize and fill the cache" if quantized else "load", [])
        ways = [("quantize", plain), ("cache", cached)] if quantized else [("load", plain)]
        for number in range(passes):
            for state in ("warm", "cold") if engines.on_card(device) else ("warm",):
                for way, spec in ways:
                    if not record.has_time():
                        record.skip(kind=kind, way=way)
                    elif state == "warm" or _forget():
                        _load(record, spec, kind, way, [state, number])
                    else:
                        record.add(kind=kind, way=way, skipped="the page cache can't be emptied")


def _load(record: Record, spec: Model, kind: str, way: str, which: list[str | int]) -> None:
    measured, began = peak.PeakMemory(record.device), time.perf_counter()
    with _loaded(spec, record.device) as (weight_bytes, cpu_s):
        engines.wait_for(record.device)
        took_s, peak_bytes = time.perf_counter() - began, measured.peak_bytes()
    record.add(
        kind=kind,
        way=way,
        page_cache=which[0] if which else "warm",
        repetition=which[1] if which else 0,
        load_s=round(took_s, 2),
        cpu_s=round(cpu_s, 2),
        weights_gib=round(weight_bytes / GIB, 3),
        peak_gib=round(peak_bytes / GIB, 3),
    )


@contextlib.contextmanager
def _loaded(spec: Model, device: str) -> Iterator[tuple[int, float]]:
    cpu = time.process_time()
    checkpoint = open_checkpoint(spec, dtypes.capability(device))
    found = weights.load(checkpoint, spec, device)
    try:
        yield found.weight_bytes, time.process_time() - cpu
    finally:
        del found
        engines.free(device)


def _forget() -> bool:
    """Have the machine forget what it holds of files; tell whether it lets us."""
    os.sync()
    try:
        DROP.write_text("1", encoding="ascii")
    except OSError:
        return False
    return True
