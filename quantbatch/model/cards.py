"""Cards by name: how much memory one has for programs, and which types of number it multiplies.

What a card has for programs is less than what it is sold with: the driver keeps 0.4 to 0.7 GiB, and
error correction on GDDR memory takes a sixteenth more. So the table holds what `cudaMemGetInfo`
gives as the total, which is what torch.cuda.mem_get_info and torch's out-of-memory errors print. It
varies with the driver by up to 0.2 GiB; the smallest value that we found stands here.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

GIB = 2**30

ESTIMATE = 0.91
"""Share of the sold memory that a card has at least, where no report was found: the lowest of the
reported ones is that of a T4 (14.56 of 16)."""


@dataclass(frozen=True, slots=True)
class Card:
    """A kind of card."""

    name: str
    """As it is sold, without the maker; empty for a card of which only the memory is known."""
    sold_gb: int
    """Memory by which it is sold; several cards of one name differ in it."""
    memory_gib: float
    """Memory that programs can have."""
    capability: tuple[int, int] | None
    """Compute capability; None if it is not known."""

    @property
    def memory_bytes(self) -> int:
        """Memory that programs can have, in bytes."""
        return int(self.memory_gib * GIB)

    @property
    def has_bfloat16(self) -> bool:
        """Whether it multiplies bfloat16: Ampere and later. Taken for granted if not known."""
        return self.capability is None or self.capability >= (8, 0)

    @property
    def has_fp8(self) -> bool:
        """Whether it multiplies 8-bit floating-point numbers: Ada and later."""
        return self.capability is not None and self.capability >= (8, 9)


CARDS = (
    # "Max memory" in a log of Unsloth (get_device_properties), driver of CUDA 12.6: 11.747.
    Card("RTX 3060", 12, 11.74, (8, 6)),
    # Properties printed by torch: total_memory=16049MB.
    Card("RTX 4080", 16, 15.67, (8, 9)),
    # Logs of Unsloth: 23.684. Properties printed by torch: 24259MB, which is 23.69.
    Card("RTX 3090", 24, 23.68, (8, 6)),
    # Logs of Unsloth: 23.647, 23.527 and, with CUDA 13, 23.51; out-of-memory reports: 23.64, 23.68
    # (THUDM/CogVideo#36).
    Card("RTX 4090", 24, 23.51, (8, 9)),
    # Logs of Unsloth: 31.342 to 31.357; an out-of-memory report: 31.36.
    Card("RTX 5090", 32, 31.34, (12, 0)),
    # Logs of Unsloth on T4s of AWS and Colab: 14.563; out-of-memory reports: 14.57.
    Card("T4", 16, 14.56, (7, 5)),
    # Out-of-memory reports: 22.03; older drivers 22.16 (logs of Unsloth).
    Card("L4", 24, 22.03, (8, 9)),
    # An out-of-memory report and properties printed by torch (22587MB) on AWS g5: 22.06.
    Card("A10G", 24, 22.05, (8, 6)),
    # An out-of-memory report: 22.06.
    Card("A10", 24, 22.06, (8, 6)),
    # An out-of-memory report: 23.53 (google/RB-Modulation#5).
    Card("A30", 24, 23.53, (8, 0)),
    # An out-of-memory report: 44.40 (QwenLM/Qwen3-VL#2097).
    Card("L40", 48, 44.40, (8, 9)),
    # Logs of Unsloth: 44.392 and 44.402; an out-of-memory report: 44.53 (Wan-Video/Wan2.1#205).
    Card("L40S", 48, 44.39, (8, 9)),
    # A log of Unsloth: 44.549.
    Card("A40", 48, 44.54, (8, 6)),
    # Logs of Unsloth: 47.431 as it is delivered; 44.427 with error correction switched on.
    Card("RTX A6000", 48, 47.43, (8, 6)),
    # Properties printed by torch: total_memory=48622MB.
    Card("RTX 6000 Ada", 48, 47.48, (8, 9)),
    # Logs of Unsloth on the server edition: 94.971.
    Card("RTX PRO 6000", 96, 94.97, (12, 0)),
    # Properties printed by torch: 16130MB and 16160MB.
    Card("V100", 16, 15.75, (7, 0)),
    # Out-of-memory reports: 31.73.
    Card("V100", 32, 31.73, (7, 0)),
    # An out-of-memory report: 39.38; logs of Unsloth: 39.494 and 39.557.
    Card("A100", 40, 39.38, (8, 0)),
    # Out-of-memory reports: 79.14 (lianqi1008/Control-GIC#6) and 79.25 (levihsu/OOTDiffusion#235).
    Card("A100", 80, 79.14, (8, 0)),
    # Measured by us on an H100 SXM with driver 580.159: 85,017,493,504 bytes, 79.179.
    Card("H100", 80, 79.17, (9, 0)),
    # Measured by us with driver 580.159: 150,109,880,320 bytes, 139.801; a log of Unsloth: 139.7.
    Card("H200", 141, 139.7, (9, 0)),
    # Out-of-memory reports and properties printed by torch (182631MB): 178.35. Sold with 180 to
    # 192 GB.
    Card("B200", 180, 178.35, (10, 0)),
    # Estimates: no report found.
    Card("RTX A5000", 24, 24 * ESTIMATE, (8, 6)),
    Card("H20", 96, 96 * ESTIMATE, (9, 0)),
    Card("GB200", 186, 186 * ESTIMATE, (10, 0)),
    Card("B300", 288, 288 * ESTIMATE, (10, 3)),
    Card("GB300", 288, 288 * ESTIMATE, (10, 3)),
)

_NOISE = re.compile(
    r"(nvidia|geforce|tesla|quadro|rtx|gpu|graphics|generation|blackwell|server|workstation|edition"
    r"|sxm\d?|pcie?|hbm\d?e?)+"
)
"""What names may have or lack."""
_MEMORY = re.compile(r"(\d+)(g|gb|gib)")
_SPACED_MEMORY = re.compile(r"(\d+)\s+(gi?b)\b")
_GLUED = re.compile(r"(?:geforce|quadro|tesla|rtx)+(?=\d)")
"""As in RTX4090."""


class UnknownCardError(ValueError):
    """No card has such a name."""


def find(name: str) -> Card:
    """Return the card of a name, however it is spelled: `NVIDIA GeForce RTX 4090`, `4090`, or
    `A100-80G` as Ray says it. Where a name stands for several sizes, that is the smallest.

    Raises:
        UnknownCardError: None has such a name, with the nearest ones.
    """
    base, sold_gb = _parts(name)
    named = [card for card in CARDS if _parts(card.name)[0] == base]
    of_size = [card for card in named if sold_gb in (None, card.sold_gb)]
    if of_size:
        return min(of_size, key=lambda card: card.memory_gib)
    if named:
        sizes = " or ".join(str(card.sold_gb) for card in named)
        raise UnknownCardError(f"{name!r}: a card of this name has {sizes} GB")
    raise UnknownCardError(f"{name!r} is no card that is known here; {_nearest(base)}")


def find_or_none(name: str) -> Card | None:
    """Return the card of a name, or None."""
    try:
        return find(name)
    except UnknownCardError:
        return None


def of_memory(memory_gib: float) -> Card:
    """Return a card of which only the memory is known."""
    return Card("", round(memory_gib), memory_gib, None)


def smallest_with(needed_bytes: int) -> Card | None:
    """Return the card with the least memory that is enough, or None."""
    enough = [card for card in CARDS if card.memory_bytes >= needed_bytes]
    return min(enough, key=lambda card: card.memory_gib, default=None)


def _parts(name: str) -> tuple[str, int | None]:
    """Split a name into what tells cards apart and its memory, if it says that."""
    words: list[str] = []
    sold_gb: int | None = None
    for word in re.findall(r"[a-z0-9]+", _SPACED_MEMORY.sub(r"\1\2", name.lower())):
        plain = _GLUED.sub("", word)
        if memory := _MEMORY.fullmatch(plain):
            sold_gb = int(memory[1])
        elif not _NOISE.fullmatch(plain):
            words.append(plain)
    return "".join(words), sold_gb


def _nearest(base: str) -> str:
    bases = {_parts(card.name)[0]: card.name for card in CARDS}
    close = difflib.get_close_matches(base, bases, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(bases[each] for each in close)}?"
    return f"known are {', '.join(dict.fromkeys(card.name for card in CARDS))}"
