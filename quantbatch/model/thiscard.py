"""The cards of this machine, as its driver tells them: without torch, which takes seconds."""

from __future__ import annotations

import csv
import os
import subprocess

from quantbatch.model import cards
from quantbatch.model.cards import Card

TIMEOUT_S = 5.0
"""The driver answers in 0.1 s, but in some seconds if no process keeps it awake."""
_FIELDS = ("name", "memory.total", "memory.reserved", "compute_cap")


def local_cards() -> list[Card]:
    """Return the cards of this machine that a process here would see; none if there is no driver,
    or it does not answer.
    """
    query = f"--query-gpu={','.join(_FIELDS)}"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        command.append(f"--id={visible}")
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return parse(answer.stdout)


def parse(text: str) -> list[Card]:
    """Read what nvidia-smi prints: a line for each card.

    What programs can have is the total less what the driver keeps (on an H100: 81,559 - 480 MiB,
    and cudaMemGetInfo gives 81,078.9; on an H200: 143,771 - 616, and 143,155.9; measured).
    """
    return [card for row in csv.reader(text.splitlines()) if (card := _card(row)) is not None]


def _card(row: list[str]) -> Card | None:
    try:
        name, total, reserved, capability = (field.strip() for field in row)
        major, minor = capability.split(".")
        gib = (int(total) - int(reserved)) / 1024
        shown = name.removeprefix("NVIDIA ").removeprefix("GeForce ")
        return Card(shown, round(int(total) / 1024), gib, (int(major), int(minor)))
    except ValueError:
        # An old driver knows no compute_cap and says [N/A]: then the table has to do.
        return cards.find_or_none(row[0]) if row else None
