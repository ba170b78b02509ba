"""Results, printed as soon as they are there: what a run that is cut off has found is not lost."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "bitsandbytes", "accelerate", "flash-attn")
GIB = 2**30


@dataclass
class Record:
    """The results of one command: a line of JSON for each, and all of them in a file.

    Args:
        command: Its name.
        device: What it ran on.
        options: What it was asked for.
        folder: Where the file goes; None for none.
        budget_s: After so many seconds nothing new is begun.
    """

    command: str
    device: str
    options: Mapping[str, Any]
    folder: Path | None = None
    budget_s: float = 540.0
    results: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._machine = machine(self.device)
        print(json.dumps({"benchmark": f"gpu {self.command}", **self._machine}), flush=True)

    @property
    def elapsed_s(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._began

    def has_time(self, needed_s: float = 0.0) -> bool:
        """Tell whether something of so many seconds may be begun."""
        return self.elapsed_s + needed_s <= self.budget_s

    def add(self, **result: Any) -> None:
        """Print a result and write all of them to the file."""
        result = {"command": self.command, **result, "at_s": round(self.elapsed_s, 1)}
        self.results.append(result)
        print(json.dumps(result), flush=True)
        self._write()

    def skip(self, why: str = "", **what: Any) -> None:
        """Say that something was not begun; without a reason, because the time is used up."""
        self.add(**what, skipped=why or f"{self.budget_s:g} s are used up")

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Tell how long a part took that is no result."""
        began = time.monotonic()
        yield
        self.add(note=what, took_s=round(time.monotonic() - began, 2))

    def _write(self) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        given = [str(value) for value in self.options.values() if isinstance(value, str) and value]
        name = re.sub(r"[^\w.-]+", "_", "-".join([self.command, *given]))
        document = {
            "benchmark": f"gpu {self.command}",
            "machine": self._machine,
            "options": dict(self.options),
            "results": self.results,
        }
        path = self.folder / f"{name}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(document, indent=1), encoding="utf-8")
        partial.rename(path)


def machine(device: str) -> dict[str, Any]:
    """Return what figures depend on: the card, its driver, and versions."""
    import torch

    found: dict[str, Any] = {"python": platform.python_version(), "versions": versions()}
    if torch.device(device).type != "cuda":
        return found | {"device": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(device)
    return found | {
        "device": properties.name,
        "memory_gib": round(properties.total_memory / GIB, 2),
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def versions() -> dict[str, str]:
    """Return the versions of what is installed of the packages that matter."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.splitlines()[0].strip()
