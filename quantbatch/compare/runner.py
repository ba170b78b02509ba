"""One width at a time: load it, let it answer, ask it about the reference's answers, free it.

There is never more than one model in memory. Of the reference stays what it said and what it
thought of each token (see `divergence.py`).
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from quantbatch.compare.candidates import float32_bytes, planned_bits
from quantbatch.compare.divergence import Beliefs, Differences, differences
from quantbatch.compare.figures import Loading, Measured, Said
from quantbatch.compare.scoring import Scorer, Text
from quantbatch.engine import loading
from quantbatch.errors import DoesNotFit, ModelError
from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.model.footprint import weigh
from quantbatch.records import Completion, Failure, Request, RequestId
from quantbatch.runner import Runner
from quantbatch.weights import dtypes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantbatch.compare.candidates import Candidate
    from quantbatch.compare.rows import ComparedRow
    from quantbatch.records import Answer
    from quantbatch.spec import JobSpec

BATCH_TOKENS = {"cuda": 4096, "cpu": 1024}
"""Tokens of a batch that is scored; its layers need less memory than the KV cache that the engine
has given back by then."""
AGAIN_SHARE = 1 / 3
"""Size of a batch of the noise floor, as a share of the usual one."""


@dataclass(frozen=True)
class Reference:
    """The width that others are compared with."""

    said: Said
    texts: tuple[Text, ...]
    """The prompts and its answers, of those rows that it could answer."""
    row_of_text: tuple[int, ...]
    beliefs: tuple[Beliefs, ...]

    def differences(self, theirs: Sequence[Beliefs]) -> Differences:
        """Compare what another thinks of the same texts."""
        counts = [text.counted for text in self.texts]
        in_prompt = [
            place < len(text.prompt_ids)
            for text in self.texts
            for place in range(text.first, len(text.token_ids))
        ]
        return differences(
            Beliefs.joined(self.beliefs),
            Beliefs.joined(theirs),
            np.repeat(np.array(self.row_of_text), counts),
            np.array(in_prompt),
        )


class FirstRun(NamedTuple):
    """What comes of running the reference."""

    reference: Reference
    measured: Measured
    again: Measured
    """Itself in other batches: how much of a difference is noise."""


@dataclass(frozen=True)
class Setting:
    """What is the same for all widths.

    Args:
        spec: The job, resolved.
        rows: What is compared.
        device: `cuda` or `cpu`.
        max_tokens: Longest prompt and answer together.
        folder: What a relative path of the model is relative to.
        with_prompts: Whether the tokens of the prompts count too.
    """

    spec: JobSpec
    rows: tuple[ComparedRow, ...]
    device: str
    max_tokens: int
    folder: str
    with_prompts: bool = False

    def texts(self, answers: Sequence[Answer]) -> dict[int, Text]:
        """Return the rows that have an answer, by their place.

        Raises:
            ModelError: None has.
        """
        found = {
            index: Text(row.prompt_ids, answer.token_ids, self.with_prompts)
            for index, (row, answer) in enumerate(zip(self.rows, answers, strict=True))
            if isinstance(answer, Completion)
        }
        if not found:
            why = next(answer.message for answer in answers if isinstance(answer, Failure))
            raise ModelError(f"the reference answers none of {len(answers)} rows: {why}")
        return found


def run_reference(setting: Setting, candidate: Candidate) -> FirstRun:
    """Let the reference answer, twice, and keep what it thinks of its own answers.

    Raises:
        JobError: It can't be loaded, does not fit, or answers no row.
    """
    with _Loaded(setting, candidate) as loaded:
        said = loaded.answer()
        said_again = loaded.answer(again=True)
        texts = setting.texts(said.answers)
        loaded.give_back_the_model()
        beliefs = loaded.scorer().ask(list(texts.values()))
        reference = Reference(said, tuple(texts.values()), tuple(texts), tuple(beliefs))
        beliefs_again = loaded.scorer(again=True).ask(reference.texts, beliefs)
        took = loaded.took()
    noise = reference.differences(beliefs_again)
    return FirstRun(
        reference,
        Measured(candidate.name, took, said, None),
        Measured(candidate.name, took, said_again, noise),
    )


def run_candidate(setting: Setting, candidate: Candidate, reference: Reference) -> Measured:
    """Let a width answer, and ask it about the reference's answers.

    Raises:
        JobError: It can't be loaded, or does not fit.
    """
    with _Loaded(setting, candidate) as loaded:
        said = loaded.answer()
        loaded.give_back_the_model()
        theirs = loaded.scorer().ask(reference.texts, reference.beliefs)
        return Measured(candidate.name, loaded.took(), said, reference.differences(theirs))


class _Loaded:
    """A width in memory, for the time of a `with`."""

    def __init__(self, setting: Setting, candidate: Candidate) -> None:
        self._setting = setting
        self._section = candidate.model.seen_from(setting.folder)
        engine: Any = setting.spec.engine
        # Copies of answers would be tokens that nobody generated.
        engine = engine.model_copy(update={"deduplicate": False})
        began = time.perf_counter()
        loaded = loading.load(
            setting.spec.model_copy(update={"model": self._section, "engine": engine}),
            engine,
            device=setting.device,
            max_tokens=setting.max_tokens,
            folder=setting.folder,
        )
        self._load_s = time.perf_counter() - began
        self._model = loaded.model
        self._planned_bytes, self._peak_bytes = loaded.planned_bytes, loaded.peak_bytes
        self._engine: loading.Loaded | None = loaded
        self._runner: Runner | None = Runner(loaded.engine)

    def __enter__(self) -> _Loaded:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            self.give_back_the_model()
        self._engine = self._runner = None
        del self._model
        gc.collect()
        if self._on_card:
            torch.cuda.empty_cache()
        if kind is not None and issubclass(kind, torch.OutOfMemoryError):
            raise DoesNotFit(
                f"out of memory while the answers were scored: {error}",
                "another process may use the device; see cluster.gpus_per_replica",
            )

    @property
    def _on_card(self) -> bool:
        return torch.device(self._setting.device).type == "cuda"

    def answer(self, *, again: bool = False) -> Said:
        """Answer the rows greedily.

        Args:
            again: In other company: in the opposite order, a third of them at a time.
        """
        assert self._runner is not None
        sampling = self._setting.spec.sampling
        requests = [
            Request(RequestId(0, index), row.prompt_ids, sampling, 0)
            for index, row in enumerate(self._setting.rows)
        ]
        at_once = len(requests)
        if again:
            requests.reverse()
            at_once = max(1, int(len(requests) * AGAIN_SHARE))
        before = self._runner.busy_s
        answers: dict[RequestId, Answer] = {}
        for begin in range(0, len(requests), at_once):
            answers |= self._runner.submit(requests[begin : begin + at_once]).result()
        ordered = tuple(answers[RequestId(0, index)] for index in range(len(requests)))
        return Said(ordered, self._runner.busy_s - before)

    def give_back_the_model(self) -> None:
        """End the engine and free its cache; the model stays."""
        if self._runner is None or self._engine is None:
            return
        self._runner.close()
        self._engine.close()
        self._engine = self._runner = None
        gc.collect()
        if self._on_card:
            torch.cuda.empty_cache()

    def scorer(self, *, again: bool = False) -> Scorer:
        """Return what asks the model; again: in other batches, padded on the other side."""
        tokens = BATCH_TOKENS["cuda" if self._on_card else "cpu"]
        if again:
            return Scorer(self._model.model, int(tokens * AGAIN_SHARE), "left")
        return Scorer(self._model.model, tokens)

    def took(self) -> Loading:
        """Return what it took so far."""
        checkpoint = open_checkpoint(self._section, dtypes.capability(self._setting.device))
        model = dtypes.resolve(checkpoint, self._section, self._setting.device)
        return Loading(
            dtype=model.dtype,
            compute_dtype=self._model.compute_dtype,
            planned_weight_bytes=weigh(checkpoint, model).total_bytes,
            weight_bytes=self._model.weight_bytes,
            bits=planned_bits(checkpoint, model),
            float32_bytes=float32_bytes(checkpoint, model),
            planned_bytes=self._planned_bytes,
            peak_bytes=self._peak_bytes(),
            load_s=self._load_s,
        )
