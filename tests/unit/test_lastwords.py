"""What is left of a process that dies, and that a hang is ended; in processes of their own."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from quantbatch import lastwords
from quantbatch.lastwords import LastWords, read
from quantbatch.suspects import DIED, HUNG, Death

if TYPE_CHECKING:
    from collections.abc import Iterator

PROGRAM = """
import ctypes, os, sys, threading, time
from pathlib import Path
from quantbatch.lastwords import LastWords, within
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
    case "stuck":
        with within(0.5, words):
            time.sleep(0.2)
        time.sleep(2)
        print("now", flush=True)
        with within(0.5, words):
            ctypes.PyDLL(None).sleep(60)
    case "leave":
        words.say("CUDA error: an illegal memory access"); os._exit(70)
    case "killed":
        os.kill(os.getpid(), 9)
    case "end":
        words.close()
"""

READER = """
import ctypes, sys, tempfile
tempfile.tempdir = sys.argv[1]
from quantbatch import stages
from quantbatch.gate import NoDoor
from quantbatch.records import Chunk, Slice
stages.READING_S = 0.5
stages.read_and_render = lambda *_, **__: ctypes.PyDLL(None).sleep(60)
item = stages.to_items([Chunk(0, 0, (Slice("a", 0, 1),))]).items[0]
stages.Reader(None, NoDoor("reader"))(stages.item_table(item))
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


@pytest.mark.parametrize(("how", "where"), [("hang", "in work"), ("stuck", "in <module>")])
def test_a_call_that_never_returns_is_ended(tmp_path: Path, how: str, where: str) -> None:
    ended, death = died(tmp_path, how)
    assert (ended.returncode, ended.stdout) == (1, "now\n"), ended.stderr
    assert death.kind == HUNG
    assert where in death.words


def test_a_chunk_that_is_read_for_ever_ends_its_reader(tmp_path: Path) -> None:
    command = [sys.executable, "-c", READER, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    [words] = tmp_path.glob("quantbatch-*/reader.words")
    assert (ended.returncode, read(words.read_text()).kind) == (1, HUNG), ended.stderr


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


@pytest.fixture
def faulthandler_kept() -> Iterator[None]:
    """Leave pytest's own as it was; all of these end in `close`."""
    yield
    faulthandler.enable(2)


@pytest.mark.usefixtures("faulthandler_kept")
@pytest.mark.parametrize("how", ["writable", "link", "file", "missing"])
def test_a_folder_that_is_not_ours_alone_is_left_alone(tmp_path: Path, how: str) -> None:
    folder, others = tmp_path / "folder", tmp_path / "others"
    others.mkdir()
    match how:
        case "writable":
            folder.mkdir()
            folder.chmod(0o777)
        case "link":
            folder.symlink_to(others)
        case "file":
            folder.touch()
        case _:
            folder = tmp_path / "none" / "folder"
    words = LastWords("a", folder)
    assert words.before == Death()
    words.watchdog(60).alive()
    words.say("lost")
    words.close()
    assert not list(tmp_path.rglob("*.words"))
    assert Path(os.devnull).exists()


@pytest.mark.usefixtures("faulthandler_kept")
def test_what_nobody_came_for_is_removed_after_a_day(tmp_path: Path) -> None:
    died(tmp_path, "killed")  # replica/1
    (tmp_path / "today.words").touch()
    alive = LastWords("alive", tmp_path)
    long_ago = time.time() - 2 * lastwords.KEPT_S
    for name in ("replica_1", "alive"):
        os.utime(tmp_path / f"{name}.words", (long_ago, long_ago))
    # Another process looks: what this one holds open, it could open itself.
    died(tmp_path, "end")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alive.words", "today.words"]
    alive.close()


@pytest.mark.usefixtures("faulthandler_kept")
def test_words_that_can_not_be_written_keep_nobody_from_leaving(tmp_path: Path) -> None:
    words = LastWords("a", tmp_path)
    words.say("\udcff")
    assert read((tmp_path / "a.words").read_text()).words == ": \\udcff"
    words.close()
    full = LastWords("b", tmp_path)
    os.ftruncate(full._file.fileno(), 0)
    with Path("/dev/full").open("w") as no_room:
        os.dup2(no_room.fileno(), full._file.fileno())
    full.say("no room")
    # What is in the buffer goes nowhere when the file is closed.
    os.dup2(os.open(os.devnull, os.O_WRONLY), full._file.fileno())
    full.close()
