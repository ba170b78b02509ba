"""Worker nodes of the test's Ray head, whose raylets can be killed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil

from tests.integration.support import end, wait_for

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.integration.support import Head

CARDS = 64
"""Pretended GPUs of a node. The head has 2: what wants more runs on a node that can be killed."""


@dataclass
class Nodes:
    """Worker nodes on this machine."""

    head: Head
    folder: Path
    """For their logs."""
    count: int
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def refill(self) -> None:
        """Start nodes for those that ended, by a kill or because a busy machine was too slow for
        one; they join within some seconds.
        """
        for _ in range(self.count - sum(node.poll() is None for node in self.started)):
            self._add()

    def _add(self) -> None:
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block",
            f"--address={self.head.address}", "--node-ip-address=127.0.0.1", "--num-cpus=4",
            f"--num-gpus={CARDS}", f"--object-store-memory={128 << 20}", "--disable-usage-stats",
        ]  # fmt: skip
        env = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_BACKEND_LOG_LEVEL": "fatal"}
        with self._log(len(self.started)).open("wb") as log:
            self.started.append(
                subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)
            )

    def _log(self, number: int) -> Path:
        return self.folder / f"node-{number}"

    def raylets(self) -> list[psutil.Process]:
        """Return the raylets of nodes that have joined, those that started first before others."""
        return [
            child
            for number, node in enumerate(self.started)
            if node.poll() is None and b"Ray runtime started" in self._log(number).read_bytes()
            for child in _children(node.pid, "raylet")
        ]

    def any_there(self) -> bool:
        """Tell whether a node has joined; start those that are missing."""
        self.refill()
        return bool(self.raylets())

    def replicas(self) -> list[psutil.Process]:
        """Return the processes that hold a replica."""
        return [p for raylet in self.raylets() for p in _children(raylet.pid, "Replica")]

    def kill_one(self) -> None:
        """Kill the raylet of the oldest node, as if the machine were gone."""
        for raylet in self.raylets()[:1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                raylet.kill()


def _children(pid: int, name: str) -> list[psutil.Process]:
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if name in " ".join([child.name(), *child.cmdline()[:1]]):
                    found.append(child)
    return found


@contextlib.contextmanager
def worker_nodes(head: Head, folder: Path, count: int) -> Iterator[Nodes]:
    """Have some worker nodes; they end with the block."""
    nodes = Nodes(head, folder, count)
    try:
        wait_for(nodes.any_there, timeout_s=240, what="a worker node")
        yield nodes
    finally:
        for node in nodes.started:
            end(node.pid)
            node.wait()
