"""Which requests are the same: a digest of 128 bits of everything that decides the answer.

Only requests whose answer is certain have one: reading ones, and those at temperature 0.
"""

from __future__ import annotations

import hashlib
from array import array
from typing import TYPE_CHECKING

from quantbatch.records import WRITE
from quantbatch.wants import Write

if TYPE_CHECKING:
    from quantbatch.records import Request
    from quantbatch.spec import Sampling

KEY_BYTES = 16


class Keys:
    """Makes the keys of requests; those that follow one another often have the same settings."""

    def __init__(self) -> None:
        self._sampling: Sampling | None = None
        self._settings = b""

    def of(self, request: Request) -> bytes | None:
        """Return a request's key; None if its answer is drawn by chance."""
        writes = isinstance(request.want, Write)
        if writes and request.sampling.temperature > 0:
            return None
        prompt = array("i", request.prompt_ids).tobytes()
        # Sampling has no say in what is read off a prompt.
        settings = self._digest(request.sampling) if writes else b""
        digest = hashlib.blake2b(prompt, digest_size=KEY_BYTES, key=settings)
        if request.want != WRITE:
            digest.update(repr(request.want).encode())
        return digest.digest()

    def _digest(self, sampling: Sampling) -> bytes:
        if sampling is not self._sampling:
            # Without what has its usual value: a field that a later version adds changes no key.
            written = sampling.model_dump_json(exclude={"seed", "n"}, exclude_defaults=True)
            self._settings = hashlib.blake2b(written.encode(), digest_size=32).digest()
            self._sampling = sampling
        return self._settings
