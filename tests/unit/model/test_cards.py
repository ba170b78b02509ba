"""Cards by name, by Ray's names, and as the driver tells them."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import pytest

from quantbatch.model import cards, thiscard
from quantbatch.model.cards import CARDS, UnknownCardError, find, find_or_none, smallest_with

if TYPE_CHECKING:
    from collections.abc import Callable

LOCAL_CARDS = thiscard.local_cards
"""As it is, before tests are told that there are none."""


@pytest.mark.parametrize(
    ("name", "found", "sold_gb"),
    [
        ("RTX 4090", "RTX 4090", 24),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 24),
        ("rtx4090", "RTX 4090", 24),
        ("4090 24 GB", "RTX 4090", 24),
        ("rtx 3060 12gb", "RTX 3060", 12),
        ("Tesla V100-SXM2-32GB", "V100", 32),
        ("V100", "V100", 16),
        ("A100", "A100", 40),
        ("A100-80G", "A100", 80),
        ("NVIDIA A100-SXM4-40GB", "A100", 40),
        ("NVIDIA H100 80GB HBM3", "H100", 80),
        ("A6000", "RTX A6000", 48),
        ("RTX 6000 Ada Generation", "RTX 6000 Ada", 48),
        ("RTX-PRO-6000", "RTX PRO 6000", 96),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000", 96),
    ],
)
def test_names_are_forgiving(name: str, found: str, sold_gb: int) -> None:
    card = find(name)
    assert (card.name, card.sold_gb) == (found, sold_gb)


def test_every_card_is_found_by_its_own_name_and_size() -> None:
    for card in CARDS:
        assert find(f"{card.name} {card.sold_gb}GB") == card
        assert card.memory_gib < card.sold_gb
        assert card.memory_gib >= cards.ESTIMATE * card.sold_gb


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("RTX 4091", "did you mean RTX 4090"),
        ("A100 96GB", "a card of this name has 40 or 80 GB"),
        ("RTX 4090 Laptop GPU", "did you mean RTX 4090"),
        ("Voodoo", "known are RTX 3060"),
    ],
)
def test_an_unknown_name_is_met_with_the_nearest(name: str, said: str) -> None:
    with pytest.raises(UnknownCardError, match=said):
        find(name)
    assert find_or_none(name) is None


def test_rays_names_of_cards_are_known() -> None:
    """Those on which bitsandbytes runs."""
    from ray.util.accelerators import accelerators as ray_names

    names = [
        getattr(ray_names, name)
        for name in dir(ray_names)
        if name.startswith("NVIDIA_") and not name.endswith(("_K80", "_P4", "_P100"))
    ]
    assert len(names) >= 12
    assert [name for name in names if find_or_none(name) is None] == []


def test_what_cards_multiply() -> None:
    bfloat16 = {card.name for card in CARDS if not card.has_bfloat16}
    assert bfloat16 == {"T4", "V100"}
    assert find("L4").has_fp8
    assert not find("A100").has_fp8
    assert cards.of_memory(24).has_bfloat16
    assert cards.of_memory(23.6).memory_bytes == int(23.6 * 2**30)


def test_the_smallest_card_that_is_enough() -> None:
    smallest = smallest_with(23 * 2**30)
    assert smallest is not None
    assert smallest.name == "RTX 4090"
    assert smallest_with(2**50) is None


H100 = "NVIDIA H100 80GB HBM3, 81559, 480, 9.0"
"""What the driver 580.159 says; torch says 85,017,493,504 bytes (measured)."""


def test_what_the_driver_says_is_what_torch_would() -> None:
    (card,) = thiscard.parse(H100 + "\n")
    assert (card.name, card.sold_gb, card.capability) == ("H100 80GB HBM3", 80, (9, 0))
    assert card.memory_bytes == pytest.approx(85_017_493_504, abs=2**20)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("No devices were found\n", []),
        ("Tesla T4, [N/A], [N/A], [N/A]\n", ["T4"]),
        (f"{H100}\nNVIDIA GeForce RTX 4090, 24564, 488, 8.9\n", ["H100 80GB HBM3", "RTX 4090"]),
    ],
)
def test_odd_answers_of_the_driver(text: str, names: list[str]) -> None:
    assert [card.name for card in thiscard.parse(text)] == names


def raising(error: Exception) -> Callable[..., Any]:
    def run(*_: Any, **__: Any) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("nvidia-smi"),
        subprocess.TimeoutExpired("nvidia-smi", 5),
        subprocess.CalledProcessError(9, "nvidia-smi"),
    ],
)
def test_no_driver_is_no_trouble(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(subprocess, "run", raising(error))
    assert LOCAL_CARDS() == []


def test_only_cards_that_a_process_sees_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, H100, "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert len(LOCAL_CARDS()) == 1
    assert asked[0][-1] == "--id=2,3"
