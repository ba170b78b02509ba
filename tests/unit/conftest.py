"""What unit tests share: no waiting for a disk, and no card. That data is synced is tested by
counting the calls."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make fsync return at once; returns the handles that were synced."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    return synced


@pytest.fixture(autouse=True)
def no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a machine without cards, whatever it has."""
    monkeypatch.setattr("quantbatch.model.thiscard.local_cards", list)
