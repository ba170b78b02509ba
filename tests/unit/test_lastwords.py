"""What is left of a process that dies, and that a hang is ended; in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from quantbatch.lastwords import read
from quantbatch.suspects import DIED, HUNG, Death

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = """
import ctypes, os, sys, threading, time
from pathlib import Path
from quantbatch.lastwords import LastWords
words = LastWords("replica/1", Path(sys.argv[1]))
def work():
    dog = words.watchdog(0.5)
    for _ in range(20):  # 4 s of short steps
        dog.alive()
        time.sleep(0.2)
    dog.rest()
    time.sleep(2)  # nothing to do is no hang
    dog.alive()
    print("now", flush=True)
    ctypes.PyDLL(None).sleep(60)  # holds Python's lock
match sys.argv[2]:
    case "segfault":
        ctypes.string_at(0)
    case "hang":
        thread = threading.Thread(target=work); thread.start(); thread.join()
    case "leave":
        words.say("CUDA error: an illegal memory access"); os._exit(70)
    case "killed":
        os.kill(os.getpid(), 9)
    case "end":
        words.close()
"""


def died(folder: Path, how: str) -> tuple[subprocess.CompletedProcess[str], Death]:
    command = [sys.executable, "-c", PROGRAM, str(folder), how]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    # The next process of that name, here this one, finds what was left.
    path = folder / "replica_1.words"
    return ended, read(path.read_text()) if path.exists() else Death()


def test_a_segmentation_fault_says_where(tmp_path: Path) -> None:
    ended, death = died(tmp_path, "segfault")
    assert ended.returncode == -11
    assert death.kind == DIED
    assert "Segmentation fault, in string_at" in death.words


def test_a_call_that_never_returns_is_ended(tmp_path: Path) -> None:
    ended, death = died(tmp_path, "hang")
    assert (ended.returncode, ended.stdout) == (1, "now\n"), ended.stderr
    assert death.kind == HUNG
    assert "in work" in death.words


def test_a_process_that_leaves_says_why(tmp_path: Path) -> None:
    assert died(tmp_path, "leave")[1].words == ": CUDA error: an illegal memory access"


@pytest.mark.parametrize("how", ["killed", "end"])
def test_others_say_nothing(tmp_path: Path, how: str) -> None:
    assert died(tmp_path, how)[1] == Death()


def test_the_next_process_reads_it_once(tmp_path: Path) -> None:
    died(tmp_path, "leave")
    program = PROGRAM.replace("match", "print(words.before.words)\nmatch", 1)
    command = [sys.executable, "-c", program, str(tmp_path), "killed"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "illegal memory access" in ended.stdout
    assert died(tmp_path, "killed")[1] == Death()
