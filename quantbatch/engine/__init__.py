"""Engines: requests in, completions out.

`Engine` is the seam between a replica, which knows chunks and Ray, and the models, which know
neither. `continuous.py` is the default. `static.py` is plain `generate`, the oracle of any faster
engine and the refuge of models that need it; `llama_cpp.py` runs GGUF files in the bits that they
have; `echo.py` has no model at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from quantbatch.records import Answer, Request


class Engine(Protocol):
    """Answers requests, whatever chunks they come from, in the order that suits the hardware.

    The caller adds requests at any time between steps and steps while there is work. One thread
    does both.
    """

    def add(self, requests: Iterable[Request]) -> None:
        """Queue requests; they are the engine's until they come back as completions or by
        `evict`.
        """
        ...

    def has_work(self) -> bool:
        """Tell whether any request is queued or running."""
        ...

    def step(self) -> Sequence[Answer]:
        """Work for a while and return what finished, possibly nothing.

        A request that the engine finds wrong by itself finishes as a `Failure`.

        Raises:
            Exception: Whatever the model raises. The requests that the step worked on are then
                given back by `evict`; all others stay queued.
        """
        ...

    def evict(self) -> Sequence[Request]:
        """Give back the requests that the step that just failed worked on, and forget what it
        computed.
        """
        ...
