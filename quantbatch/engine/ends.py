"""Where an answer ends, and what it says: end tokens, stop strings, text.

A stop string may begin and end within tokens, and a character may take several of them, so whether
one is there is asked of the text of the whole answer. An engine may look at less to be fast
(`Endings.stopped`); `find_stop` then decides, and cuts exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from quantbatch.records import Completion, FinishReason, TokenLogprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from quantbatch.records import Request
    from quantbatch.spec import Sampling

Decode = Callable[[Sequence[int]], str]
"""Turns token ids into text without special tokens."""

SPARE_TOKENS = 8
"""Tokens without text that may stand within a stop string before it is found late."""


class Endings:
    """What ends the answers of one model, and turns tokens into them.

    Args:
        model: With a generation config that says only which tokens end an answer.
        tokenizer: The model's.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.model_end_ids = _end_ids(model, tokenizer)
        """The tokens that end any answer."""
        pad_ids = (model.generation_config.pad_token_id, tokenizer.pad_token_id)
        # What stands in padding does not matter: it is masked, and cut off answers.
        self.pad_id: int = next(
            (t for t in (*pad_ids, *sorted(self.model_end_ids)) if isinstance(t, int)), 0
        )
        added = tokenizer.added_tokens_decoder.items()
        self._hidden = {token.content: number for number, token in added if token.special}
        self._by_stops: dict[tuple[tuple[str, ...], tuple[int, ...]], frozenset[int]] = {}
        self._by_bad_words: dict[tuple[str, ...], tuple[tuple[int, ...], ...]] = {}

    def end_ids(self, sampling: Sampling) -> frozenset[int]:
        """Return the tokens that end an answer.

        Stop strings that are special tokens are among them: the text does not show those.
        """
        key = (tuple(sampling.stop), tuple(sampling.stop_token_ids))
        if key not in self._by_stops:
            hidden = {self._hidden[stop] for stop in sampling.stop if stop in self._hidden}
            self._by_stops[key] = self.model_end_ids | hidden | set(sampling.stop_token_ids)
        return self._by_stops[key]

    def bad_word_ids(self, sampling: Sampling) -> tuple[tuple[int, ...], ...]:
        """Return the runs of tokens that no answer may hold: each bad word as it is, and as it
        stands after a space, which most vocabularies write with other tokens.
        """
        key = tuple(sampling.bad_words)
        if key not in self._by_bad_words:
            texts = [text for word in key for text in (word, f" {word}")]
            runs = [tuple(self._tokenizer.encode(text, add_special_tokens=False)) for text in texts]
            self._by_bad_words[key] = tuple(dict.fromkeys(run for run in runs if run))
        return self._by_bad_words[key]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Turn tokens into text without special tokens."""
        # Cleaning up would take spaces before punctuation out of the answer: a habit from BERT.
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def stopped(self, token_ids: Sequence[int], sampling: Sampling) -> bool:
        """Tell whether the last of these generated tokens ends the answer by an end token or a stop
        string; fast, since it is asked for each token.
        """
        if token_ids[-1] in self.end_ids(sampling):
            return True
        if not sampling.stop or not self._may_hold_stop(token_ids, sampling):
            return False
        return find_stop(token_ids, sampling, self.decode) is not None

    def _may_hold_stop(self, token_ids: Sequence[int], sampling: Sampling) -> bool:
        """Look for stop strings at the end only: what is missed here is found a few tokens late."""
        window = SPARE_TOKENS + max(len(stop.encode()) for stop in sampling.stop)
        text = self.decode(token_ids[-window:])
        return any(stop in text for stop in sampling.stop)

    def completion(
        self,
        request: Request,
        generated: Sequence[int],
        logprobs: Sequence[TokenLogprobs] | None = None,
    ) -> Completion:
        """Cut what was generated for a row where its answer ends; there may be more, even padding.

        Args:
            request: What the row wanted.
            generated: Its tokens, from the first generated one on.
            logprobs: One for each of the tokens, if they were asked for.
        """
        sampling, end_ids = request.sampling, self.end_ids(request.sampling)
        end = next((i + 1 for i, token in enumerate(generated) if token in end_ids), None)
        token_ids = generated[:end]
        cut = find_stop(token_ids, sampling, self.decode) if sampling.stop else None
        token_ids = token_ids[: cut.tokens] if cut else token_ids
        shown = token_ids[:-1] if end and token_ids[-1] in sampling.stop_token_ids else token_ids
        text = self.decode(shown)[: cut.characters if cut else None]
        stopped = end is not None or cut is not None
        reason = FinishReason.STOP if stopped else FinishReason.LENGTH
        kept = None if logprobs is None else tuple(logprobs[: len(token_ids)])
        return Completion(request.id, text, tuple(token_ids), reason, kept)


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Collect what ends an answer: what generation_config.json (else config.json) says, and the
    tokenizer's end token.

    Both are needed: fine-tuned models often end their answers with the tokenizer's <|im_end|> but
    carry the generation config of their base model.
    """
    generation: Any = model.generation_config
    configured = generation.eos_token_id
    end_ids = {configured} if isinstance(configured, int) else set(configured or ())
    return frozenset(end_ids | {tokenizer.eos_token_id} - {None})


class Cut(NamedTuple):
    """Where a stop string ends an answer."""

    tokens: int
    """Tokens up to the one that completed the stop string."""
    characters: int
    """Characters before the stop string."""


def find_stop(token_ids: Sequence[int], sampling: Sampling, decode: Decode) -> Cut | None:
    """Find the first token that completes a stop string, and where that string begins.

    Of several that the same token completes, the one that begins first counts. One that is complete
    before `min_new_tokens` does not end the answer.
    """
    earlier = (
        len(decode(token_ids[: sampling.min_new_tokens - 1])) if sampling.min_new_tokens else 0
    )

    def begin(count: int) -> int | None:
        text = decode(token_ids[:count])
        begins = [text.find(stop, max(0, earlier - len(stop) + 1)) for stop in sampling.stop]
        return min((at for at in begins if at >= 0), default=None)

    if begin(len(token_ids)) is None:
        return None
    shortest, enough = 0, len(token_ids)
    while enough - shortest > 1:
        middle = (shortest + enough) // 2
        shortest, enough = (middle, enough) if begin(middle) is None else (shortest, middle)
    found = begin(enough)
    assert found is not None
    return Cut(enough, found)
