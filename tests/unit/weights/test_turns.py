"""Who waits before loading, and for how long."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from quantbatch.weights import turns
from quantbatch.weights.turns import is_warm, turn

COLD: list[Path] = []
"""Files that are not there are not in memory either."""


@pytest.fixture(autouse=True)
def _quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(turns, "LOOK_EVERY_S", 0.01)


def test_cold_loads_are_one_after_another(caplog: pytest.LogCaptureFixture) -> None:
    at_work, most = [0], [0]

    def load() -> None:
        with turn("digest", lambda: COLD):
            at_work[0] += 1
            most[0] = max(most[0], at_work[0])
            time.sleep(0.05)
            at_work[0] -= 1

    threads = [threading.Thread(target=load) for _ in range(4)]
    with caplog.at_level("INFO"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == [1]
    waits = [
        said for said in caplog.messages if "another replica of this node is the first" in said
    ]
    assert len(waits) == 3, "once for each who waited"


def test_another_model_does_not_wait() -> None:
    with turn("one", lambda: COLD), turn("another", lambda: COLD):
        pass


def test_nobody_waits_any_more_once_the_files_are_in_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warm = threading.Event()
    monkeypatch.setattr(turns, "is_warm", lambda _: warm.is_set())
    entered = threading.Event()

    def load() -> None:
        with turn("digest", lambda: COLD):
            entered.set()

    with turn("digest", lambda: COLD):
        thread = threading.Thread(target=load)
        thread.start()
        assert not entered.wait(0.1)
        warm.set()
        assert entered.wait(5), "while the first one still loads"
        thread.join()


def test_who_finds_the_files_in_memory_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "is_warm", lambda _: True)
    with turn("digest", lambda: COLD):
        monkeypatch.setattr(turns, "is_warm", lambda _: False)
        with turn("digest", lambda: COLD):
            pass


def test_a_killed_loader_is_waited_for_no_longer(tmp_path: Path) -> None:
    code = (
        "import sys, tempfile, time; tempfile.tempdir = sys.argv[1]\n"
        "from quantbatch.weights.turns import turn\n"
        "with turn('digest', list): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert holder.stdout
    assert holder.stderr
    assert holder.stdout.readline() == b"held\n"
    killer = threading.Timer(0.2, holder.kill)
    killer.start()
    started = time.monotonic()
    with turn("digest", lambda: COLD):
        waited = time.monotonic() - started
    assert 0.1 < waited < 5
    killer.join()
    holder.wait()
    holder.stdout.close()
    holder.stderr.close()


def test_a_load_that_fails_gives_its_turn_back() -> None:
    with pytest.raises(ValueError, match="no model"), turn("digest", lambda: COLD):
        raise ValueError("no model")
    with turn("digest", lambda: COLD):
        pass


def test_a_node_without_a_folder_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    with turn("digest", lambda: COLD):
        pass
    (warning,) = caplog.messages
    assert "may load at the same time" in warning


@pytest.mark.parametrize("supported", [True, False])
def test_the_page_cache_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, supported: bool
) -> None:
    """Files just written are in it; the kernel can be asked to forget them when they are synced."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if not supported:
        monkeypatch.setattr(os, "preadv", refuse)
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(1 << 20) * 32)
    if not is_warm([path]):
        pytest.skip("this system does not tell what is in memory")
    handle = os.open(path, os.O_RDONLY)
    os.fdatasync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)
    assert not is_warm([path])
    path.read_bytes()
    assert is_warm([path])
    assert not is_warm([path, tmp_path / "not there"])
    assert not is_warm([])


def test_a_file_that_can_t_be_looked_at_is_not_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "weights").write_bytes(b"x")
    monkeypatch.setattr(os, "preadv", refuse)
    assert not is_warm([tmp_path / "weights"])
