"""What glibc keeps of freed memory."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import contextlib, sys
from pathlib import Path
from quantbatch.weights.heap import lean_heap

def resident():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) // 1024

before = resident()
with lean_heap() if sys.argv[1] == "lean" else contextlib.nullcontext():
    bytearray(30 << 20)  # each block of a size that was freed once stays in the heap
    kept = []
    for _ in range(20):
        block = bytearray(20 << 20)
        kept.append(bytes(5000))
        del block
    blocks = [bytearray(20 << 20) for _ in range(10)]
    kept.append(bytes(5000))
    del blocks
print(resident() - before)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt") or not Path("/proc/self/status").exists(),
    reason="needs glibc on Linux",
)
def test_freed_blocks_go_back_to_the_kernel() -> None:
    def left(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert left("lean") < 10
    assert left("usual") > 100
