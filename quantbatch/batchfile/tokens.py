"""The texts and bytes of single tokens, as log-probabilities name them."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

from quantbatch.records import FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantbatch.records import Completion

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""How sentencepiece names the token of a byte."""
_SPACE = "\u2581"
"""What sentencepiece writes for a space."""


class TokenTexts:
    """Texts of tokens.

    Args:
        load: Returns the model's tokenizer; called when a token is first asked for, because most
            jobs never do.
    """

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load

    @functools.cached_property
    def _tokenizer(self) -> Any:  # noqa: ANN401 - varies with its class
        return self._load()

    @functools.cached_property
    def _alphabet(self) -> dict[str, int]:
        """Bytes by the characters that stand for them in a vocabulary over bytes; else nothing."""
        backend = self._tokenizer.backend_tokenizer
        return _byte_alphabet() if "ByteLevel" in repr(backend.decoder) else {}

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self._tokenizer.all_special_ids)

    def data(self, token: int) -> bytes | None:
        """Return the bytes of a token; None where they are not known."""
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return None
        if found := _BYTE.fullmatch(name):
            return bytes([int(found[1], 16)])
        added = token in self._tokenizer.added_tokens_decoder
        if self._alphabet and not added and all(char in self._alphabet for char in name):
            return bytes(self._alphabet[char] for char in name)
        if name.startswith(_SPACE) and not added:
            return str(name).replace(_SPACE, " ").encode()
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        return None if "\ufffd" in text else text.encode()

    def text(self, token: int) -> str:
        """Return the text of a token; a part of a character is U+FFFD."""
        data = self.data(token)
        return "\ufffd" if data is None else data.decode(errors="replace")

    def shown(self, answer: Completion) -> int:
        """Return how many of an answer's tokens its text shows: not the one that ended it, and
        none of a stop string.
        """
        count = len(answer.token_ids)
        if answer.finish_reason is not FinishReason.STOP or not count:
            return count
        if answer.token_ids[-1] in self._special:
            return count - 1
        size, needed = 0, len(answer.text.encode())
        for place, token in enumerate(answer.token_ids):
            if size >= needed:
                return place
            size += len(self.data(token) or b"?")
        return count


def _byte_alphabet() -> dict[str, int]:
    """Return the bytes by their characters in GPT-2's alphabet: printable ones stand for
    themselves, the others for the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    named = {chr(byte): byte for byte in printable}
    return named | {chr(0x100 + place): byte for place, byte in enumerate(others)}
