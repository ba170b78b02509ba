"""The most memory that a model and its work took."""

from __future__ import annotations

import contextlib
import gc
import resource
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures from its making on; make it just before loading.

    On CUDA it is what the allocator reserved: the context is not in it, fragmentation is. On a CPU
    it is the growth of the process, the pages of files that it mapped included: the highest
    resident size since the start less the size at the start. Where the kernel does not let a
    process forget its earlier peak (no Linux, gVisor), only the growth beyond that is seen.

    Args:
        device: Such as `cpu`, `cuda` or `cuda:1`.
        cards: With more than one, it is the sum over the first so many cards.
    """

    def __init__(self, device: str, *, cards: int = 1) -> None:
        self._device = torch.device(device)
        self._cards = [self._device] if cards == 1 else range(cards)
        gc.collect()
        if self._device.type == "cuda":
            for card in self._cards:
                torch.cuda.reset_peak_memory_stats(card)
        else:
            self._start_bytes = _forget_peak()

    def peak_bytes(self) -> int:
        """Return the most memory taken since the start, in bytes."""
        if self._device.type == "cuda":
            return sum(torch.cuda.max_memory_reserved(card) for card in self._cards)
        return max(0, _peak_bytes() - self._start_bytes)


def _forget_peak() -> int:
    """Make the present size of the process its peak, if possible, and return its peak in bytes."""
    # proc_pid_clear_refs(5): "5" resets the peak. A process may do that to itself.
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text("5", encoding="ascii")
    return _peak_bytes()


def _peak_bytes() -> int:
    if STATUS.exists():
        fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_bytes(device: str, share: float) -> int | None:
    """Return the memory that a replica may fill, in bytes; None where there is no card to fill.

    Args:
        device: Such as `cpu` or `cuda`.
        share: Cards of one replica; below 1 it is the part of a card that it may take, and of
            several the least counts.
    """
    if torch.device(device).type != "cuda":
        return None
    cards = range(int(share)) if share > 1 else [device]
    total = min(torch.cuda.mem_get_info(card)[1] for card in cards)
    return int(total * min(share, 1))
