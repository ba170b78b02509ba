"""The teacher-forced pass: what a model thinks of each token of texts that are given.

It is transformers' own forward, in padded batches. Scores of all words are there for a few hundred
tokens at a time only: over a vocabulary of 152,064 words those of 2,048 tokens would take 3 GiB. So
the layers run once over a batch, and then the model's own forward is called again for each piece of
the tokens that count, with the layers replaced by what they returned: whatever a model does to its
scores after the output head, such as scaling or capping them, is then done as always.

Shapes: B rows, T tokens with padding, P tokens whose score counts, H hidden size, V words, K words
that are kept.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch

from quantbatch.compare.divergence import DRAWN_WORDS, TOP_WORDS, Beliefs
from quantbatch.compare.statistics import SEED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

SCORE_BYTES = 2 + 4 + 4 + 4 + 4
"""For each token and word: scores in 16 bits and in float32, log-probabilities, those of the words
beyond the likeliest, and what drawing from them or adding them up takes."""
PIECE_BYTES = 256 * 2**20
"""What scores may take at once: 98 tokens of 152,064 words."""


@dataclass(frozen=True)
class Text:
    """A prompt and the answer that is given after it."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    with_prompt: bool = False
    """Whether the tokens of the prompt count too; its first has nothing before it."""

    @property
    def first(self) -> int:
        """Place of the first token that counts."""
        return 1 if self.with_prompt else len(self.prompt_ids)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Prompt and answer."""
        return self.prompt_ids + self.answer_ids

    @property
    def counted(self) -> int:
        """How many tokens count."""
        return len(self.token_ids) - self.first


@dataclass(frozen=True)
class Scorer:
    """Asks a model about texts.

    Args:
        model: As `weights.loading` returns it, with its own attention.
        batch_tokens: Most tokens of a batch with its padding; a longer text is a batch by itself.
        padding: On which side.
        top_words: Words that are kept of each token.
    """

    model: PreTrainedModel
    batch_tokens: int
    padding: Literal["left", "right"] = "right"
    top_words: int = TOP_WORDS

    @torch.inference_mode()
    def ask(self, texts: Sequence[Text], about: Sequence[Beliefs] | None = None) -> list[Beliefs]:
        """Return what the model thinks of each text's tokens that count.

        Args:
            texts: In any order; each has a token that counts.
            about: For each text the reference's beliefs, whose words are asked for; None asks for
                the model's own likeliest ones.
        """
        found: dict[int, Beliefs] = {}
        for batch in self._batches(texts):
            rows = [texts[index] for index in batch]
            words = Words.of([about[index] for index in batch]) if about is not None else None
            asked = self._ask_batch(rows, words, SEED + batch[0])
            ends = np.cumsum([row.counted for row in rows])[:-1]
            found |= dict(zip(batch, asked.split(ends.tolist()), strict=True))
        return [found[index] for index in range(len(texts))]

    def _batches(self, texts: Sequence[Text]) -> Iterator[list[int]]:
        """Yield texts of similar length, the longest first: short memory then shows at once."""
        batch: list[int] = []
        longest = 0
        order = sorted(range(len(texts)), key=lambda i: (-len(texts[i].token_ids), i))
        for index in order:
            longest = longest or len(texts[index].token_ids)
            if batch and longest * (len(batch) + 1) > self.batch_tokens:
                yield batch
                batch, longest = [], len(texts[index].token_ids)
            batch.append(index)
        if batch:
            yield batch

    def _ask_batch(self, texts: Sequence[Text], words: Words | None, seed: int) -> Beliefs:
        inputs, starts = self._inputs(texts)
        output = self._layers(inputs)
        hidden_BTH: Tensor = output.last_hidden_state
        device = hidden_BTH.device  # of several, that of the last layers
        random = torch.Generator(device).manual_seed(seed)
        rows = [row for row, text in enumerate(texts) for _ in range(text.counted)]
        # What stands at a place is what the model thinks of the next one.
        places = [
            start + place - 1
            for start, text in zip(starts, texts, strict=True)
            for place in range(text.first, len(text.token_ids))
        ]
        hidden_PH = hidden_BTH[
            torch.tensor(rows, device=device), torch.tensor(places, device=device)
        ]
        targets = [token for text in texts for token in text.token_ids[text.first :]]
        targets_P = torch.tensor(targets, device=device)
        pieces = []
        step = self._piece_tokens()
        for begin in range(0, len(targets), step):
            piece = slice(begin, begin + step)
            scores_PV = self._head(output, hidden_PH[piece]).to(device)
            asked = words.part(piece, device) if words else None
            logprobs_PV = logprobs_of(scores_PV)
            asked = asked or choose_words(logprobs_PV, self.top_words, random)
            pieces.append(beliefs_of(logprobs_PV, targets_P[piece], asked))
        return Beliefs.joined(pieces)

    def _piece_tokens(self) -> int:
        model: Any = self.model
        words: int = model.get_input_embeddings().num_embeddings
        return max(1, PIECE_BYTES // (SCORE_BYTES * words))

    def _inputs(self, texts: Sequence[Text]) -> tuple[dict[str, Tensor], list[int]]:
        """Return the model's arguments, and the place at which each text begins."""
        longest = max(len(text.token_ids) for text in texts)
        ids_BT = torch.zeros(len(texts), longest, dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT)
        starts = []
        for row, text in enumerate(texts):
            length = len(text.token_ids)
            start = longest - length if self.padding == "left" else 0
            ids_BT[row, start : start + length] = torch.tensor(text.token_ids)
            mask_BT[row, start : start + length] = 1
            starts.append(start)
        inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
        if self._takes("position_ids"):
            inputs["position_ids"] = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        return {k: tensor.to(self.model.device) for k, tensor in inputs.items()}, starts

    def _takes(self, argument: str) -> bool:
        return argument in inspect.signature(self.model.forward).parameters

    def _layers(self, inputs: dict[str, Tensor]) -> Any:  # noqa: ANN401 - varies with the model
        """Run the model, with scores for the last token only, and return what its layers gave."""
        kept: list[Any] = []
        last = {"logits_to_keep": 1} if self._takes("logits_to_keep") else {}
        hook = self._body.register_forward_hook(lambda _module, _args, output: kept.append(output))
        try:
            model: Any = self.model
            model(**inputs, **last, use_cache=False, return_dict=True)
        finally:
            hook.remove()
        return kept[-1]

    def _head(self, output: Any, hidden_PH: Tensor) -> Tensor:  # noqa: ANN401 - see `_layers`
        """Return the scores (P, V) that follow from what the layers gave."""
        fields = {**output, "last_hidden_state": hidden_PH[None]}
        ids_1P = torch.zeros(1, len(hidden_PH), dtype=torch.long, device=hidden_PH.device)
        with _returning(self._body, type(output)(**fields)):
            model: Any = self.model
            scores: Tensor = model(input_ids=ids_1P, use_cache=False, return_dict=True).logits[0]
        assert len(scores) == len(hidden_PH), "the model scored other tokens than asked"
        return scores

    @property
    def _body(self) -> Any:  # noqa: ANN401 - has no type of its own
        """The layers below the output head."""
        body: Any = self.model.base_model
        assert body is not self.model, f"{type(self.model).__name__} has no layers of its own"
        return body


@contextlib.contextmanager
def _returning(module: torch.nn.Module, output: Any) -> Iterator[None]:  # noqa: ANN401 - see `_layers`
    """Have a module return something that is there already."""
    own = module.__dict__.get("forward")
    module.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


class Words(NamedTuple):
    """What a model is asked about at each token."""

    top_PK: Tensor
    drawn_PM: Tensor

    @classmethod
    def of(cls, beliefs: Sequence[Beliefs]) -> Words:
        """Return the words that the reference was asked about."""
        found = Beliefs.joined(beliefs)
        return cls(torch.from_numpy(found.words_PK), torch.from_numpy(found.drawn_PM))

    def part(self, which: slice, device: torch.device) -> Words:
        """Return those of some tokens, on a device."""
        return Words(*(words[which].to(device, torch.long) for words in self))


def logprobs_of(scores_PV: Tensor) -> Tensor:
    """Return log-probabilities in float32."""
    scores_PV = scores_PV.float()
    return scores_PV - scores_PV.logsumexp(-1, keepdim=True)


def choose_words(logprobs_PV: Tensor, top_words: int, random: torch.Generator) -> Words:
    """Return the likeliest words, and some of the others, drawn by their probability."""
    top_PK = logprobs_PV.topk(min(top_words, logprobs_PV.shape[1]), sorted=False).indices
    if top_PK.shape[1] == logprobs_PV.shape[1]:
        return Words(top_PK, top_PK[:, :0])
    others_PV = logprobs_PV.scatter(1, top_PK, -torch.inf)
    # Relative to the largest, since all of them may be too small for float32; and rows that are no
    # numbers are left out later, so that any words do for them.
    others_PV -= others_PV.amax(-1, keepdim=True)
    weights_PV = others_PV.exp_().nan_to_num_(1.0)
    drawn_PM = torch.multinomial(weights_PV, DRAWN_WORDS, replacement=True, generator=random)
    return Words(top_PK, drawn_PM)


def beliefs_of(logprobs_PV: Tensor, targets_P: Tensor, words: Words) -> Beliefs:
    """Reduce log-probabilities to what is kept of them.

    Args:
        logprobs_PV: In float32; overwritten.
        targets_P: The tokens that came.
        words: What is asked about.
    """
    kept_PK = logprobs_PV.gather(1, words.top_PK)
    drawn_PM = logprobs_PV.gather(1, words.drawn_PM)
    target_P = logprobs_PV.gather(1, targets_P[:, None])[:, 0]
    likeliest_P = logprobs_PV.argmax(-1)
    others_P = logprobs_PV.scatter_(1, words.top_PK, -torch.inf).logsumexp(-1)
    return Beliefs(
        words.top_PK.to("cpu", torch.int32).numpy(),
        kept_PK.cpu().numpy(),
        others_P.cpu().numpy(),
        words.drawn_PM.to("cpu", torch.int32).numpy(),
        drawn_PM.cpu().numpy(),
        target_P.cpu().numpy(),
        likeliest_P.to("cpu", torch.int32).numpy(),
    )
