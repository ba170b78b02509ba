"""Two libraries of token masks side by side: compiling, filling the masks of a batch, memory.

xgrammar is no dependency: `pip install --no-deps xgrammar apache-tvm-ffi` beside it, or only
llguidance is measured.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import random
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 12},
        "category": {"enum": ["billing", "shipping", "product", "other"]},
        "stars": {"type": "integer", "minimum": 1, "maximum": 5},
        "score": {"type": "number", "minimum": 0, "maximum": 1},
        "urgent": {"type": "boolean"},
        "tags": {"type": "array", "items": {"enum": ["new", "loud", "late"]}, "maxItems": 2},
    },
    "required": ["title", "category", "stars", "score", "urgent", "tags"],
    "additionalProperties": False,
}
"""Six fields, all bounded, so that every answer ends."""
ROWS = 32
STEPS = 40


class Library(Protocol):
    """What is measured of each."""

    def compile(self) -> Any:
        """Return the schema, compiled anew."""
        ...

    def matcher(self, compiled: Any) -> Any:
        """Return what follows one answer."""
        ...

    def fill(self, matcher: Any, masks: NDArray[np.int32], row: int) -> None:
        """Fill the mask of one answer."""
        ...

    def fill_all(self, matchers: list[Any], masks: NDArray[np.int32]) -> None:
        """Fill the masks of all answers, in the library's own threads."""
        ...

    def accept(self, matcher: Any, token: int) -> bool:
        """Take a token; false if it does not fit."""
        ...


class LlGuidance:
    """llguidance: Earley parsing over a trie of the vocabulary, nothing precomputed."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, words: int) -> None:
        import llguidance
        from llguidance.hf import from_tokenizer

        self._ll = llguidance
        self._tokenizer = from_tokenizer(tokenizer, n_vocab=words)
        self._executor = llguidance.LLExecutor()

    def compile(self) -> Any:
        """Return the schema, compiled anew."""
        text = self._ll.LLMatcher.grammar_from_json_schema(
            SCHEMA, overrides={"whitespace_flexible": False}
        )
        found = self._ll.LLMatcher(self._tokenizer, text)
        assert not found.is_error(), found.get_error()
        return found

    def matcher(self, compiled: Any) -> Any:
        """Return what follows one answer."""
        return compiled.deep_copy()

    def fill(self, matcher: Any, masks: NDArray[np.int32], row: int) -> None:
        """Fill the mask of one answer."""
        matcher.unsafe_compute_mask_ptr(masks[row].ctypes.data, masks.shape[1] * 4)

    def fill_all(self, matchers: list[Any], masks: NDArray[np.int32]) -> None:
        """Fill the masks of all answers, in the library's own threads."""
        self._executor.unsafe_compute_mask_ptr(
            [(m, i) for i, m in enumerate(matchers)],
            masks.ctypes.data,
            masks.shape[1] * 4,
            len(masks),
        )

    def accept(self, matcher: Any, token: int) -> bool:
        """Take a token; false if it does not fit."""
        return bool(matcher.consume_token(token))


class XGrammar:
    """xgrammar: a pushdown automaton whose context-free masks are computed when compiling."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, words: int) -> None:
        xgrammar: Any = importlib.import_module("xgrammar")
        self._xgr = xgrammar
        self._info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=words)
        self._batch = xgrammar.BatchGrammarMatcher(max_threads=2)

    def compile(self) -> Any:
        """Return the schema, compiled anew."""
        # A new compiler each time: it remembers what it compiled.
        compiler = self._xgr.GrammarCompiler(self._info, max_threads=2)
        return compiler.compile_json_schema(json.dumps(SCHEMA), any_whitespace=False)

    def matcher(self, compiled: Any) -> Any:
        """Return what follows one answer."""
        return self._xgr.GrammarMatcher(compiled)

    def fill(self, matcher: Any, masks: NDArray[np.int32], row: int) -> None:
        """Fill the mask of one answer."""
        matcher.fill_next_token_bitmask(self._tensor(masks), row)

    def fill_all(self, matchers: list[Any], masks: NDArray[np.int32]) -> None:
        """Fill the masks of all answers, in the library's own threads."""
        self._batch.batch_fill_next_token_bitmask(matchers, self._tensor(masks))

    def accept(self, matcher: Any, token: int) -> bool:
        """Take a token; false if it does not fit."""
        return bool(matcher.accept_token(token))

    @staticmethod
    def _tensor(masks: NDArray[np.int32]) -> Any:
        import torch

        return torch.from_numpy(masks)


LIBRARIES: dict[str, Callable[[PreTrainedTokenizerFast, int], Library]] = {
    "llguidance": LlGuidance,
    "xgrammar": XGrammar,
}


def installed() -> list[str]:
    """Return the libraries that can be measured here."""
    return [name for name in LIBRARIES if importlib.util.find_spec(name)]


def measure(name: str, tokenizer: PreTrainedTokenizerFast, words: int) -> dict[str, Any]:
    """Measure one library in this process, which should be a fresh one: memory is its growth."""
    before = _rss_mib()
    took_s, library = _timed(lambda: LIBRARIES[name](tokenizer, words))
    found: dict[str, Any] = {"tokenizer_s": round(took_s, 2), "tokenizer_mib": _rss_mib() - before}
    before = _rss_mib()
    compiles = [_timed(library.compile) for _ in range(4)]
    found |= {
        "first_compile_ms": round(compiles[0][0] * 1000, 1),
        "compile_ms": round(statistics.median(t for t, _ in compiles[1:]) * 1000, 1),
    }
    compiled = compiles[-1][1]
    took_s, matchers = _timed(lambda: [library.matcher(compiled) for _ in range(ROWS)])
    found |= {"copy_ms": round(took_s * 1000 / ROWS, 3)}
    masks = np.zeros((ROWS, (words + 31) // 32), np.int32)
    found |= _walk(library, matchers, masks, words)
    matchers = [library.matcher(compiled) for _ in range(ROWS)]
    found |= {"python_while_filling": _python_share(partial(library.fill_all, matchers, masks))}
    return found | {"grammar_mib": _rss_mib() - before}


def _walk(
    library: Library, matchers: list[Any], masks: NDArray[np.int32], words: int
) -> dict[str, float]:
    """Follow random answers, and fill the masks of each step in three ways."""
    draw = random.Random(1)
    one: list[float] = []
    two: list[float] = []
    own: list[float] = []
    with ThreadPoolExecutor(2) as threads:
        live = list(matchers)
        for _ in range(STEPS):
            if not live:
                break
            again = masks[: len(live)]

            fill = partial(_fill_one, library, live, again)
            # Filled again, a state is known to a library that remembers masks: so the order of the
            # three changes from step to step, and the median tells.
            rows = range(len(live))
            ways: list[tuple[list[float], Callable[[], Any]]] = [
                (one, partial(_all_of, map, fill, rows)),
                (two, partial(_all_of, threads.map, fill, rows)),
                (own, partial(library.fill_all, live, again)),
            ]
            draw.shuffle(ways)
            for times, way in ways:
                times.append(_timed(way)[0] * 1000 * ROWS / len(live))
            going = []
            for row, matcher in enumerate(live):
                allowed = np.unpackbits(again[row].view(np.uint8), bitorder="little")[:words]
                token = int(draw.choice(np.flatnonzero(allowed)))
                if token != words - 1 and library.accept(matcher, token):
                    going.append(matcher)
            live = going
    return {
        "fill_32_ms": round(statistics.median(one), 3),
        "fill_32_worst_ms": round(max(one), 1),
        "fill_32_two_threads_ms": round(statistics.median(two), 3),
        "fill_32_own_threads_ms": round(statistics.median(own), 3),
        "fill_32_own_threads_worst_ms": round(max(own), 1),
    }


def _fill_one(library: Library, live: list[Any], masks: NDArray[np.int32], row: int) -> None:
    library.fill(live[row], masks, row)


def _all_of(each: Callable[..., Any], work: Callable[[int], None], rows: range) -> None:
    list(each(work, rows))


def _python_share(fill: Callable[[], Any]) -> float:
    """Return how fast Python runs while another thread fills masks, 1 being as fast as alone."""
    alone = _counted(0.3, threading.Event())
    stop = threading.Event()

    def keep_filling() -> None:
        while not stop.is_set():
            fill()

    other = threading.Thread(target=keep_filling)
    other.start()
    beside = _counted(0.3, threading.Event())
    stop.set()
    other.join()
    return round(beside / alone, 2)


def _counted(seconds: float, stop: threading.Event) -> int:
    count, until = 0, time.perf_counter() + seconds
    while time.perf_counter() < until and not stop.is_set():
        count += 1
    return count


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def _rss_mib() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 >> 20
