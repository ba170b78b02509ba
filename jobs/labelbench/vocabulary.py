"""A byte-level BPE tokenizer with as many words as large models have, made on the spot."""

from __future__ import annotations

import json
import random
import sysconfig
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    from collections.abc import Iterator

hf: Any = transformers

TRAINED_WORDS = 50_000
FILES = 400
END = "<|im_end|>"


def make(words: int) -> Any:
    """Return a tokenizer of exactly so many words.

    The first 50,000 are trained on Python's standard library; the others are merges of two of
    those, drawn at random from the shorter ones, since that library has no more to teach.
    """
    trained = min(words, TRAINED_WORDS)
    learning = Tokenizer(models.BPE())
    learning.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learning.train_from_iterator(
        _texts(),
        trainers.BpeTrainer(
            vocab_size=trained - 1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    vocabulary, merges = _more(learning, words - 1)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = learning.pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def _texts() -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in islice(sorted(library.glob("*.py")), FILES):
        yield file.read_text("utf-8", "replace")


def _more(learned: Tokenizer, words: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    found = json.loads(learned.to_str())["model"]
    vocabulary: dict[str, int] = found["vocab"]
    merges = [(one, other) for one, other in found["merges"]]
    short = [word for word in vocabulary if len(word) <= 5]
    draw = random.Random(0)
    while len(vocabulary) < words:
        pair = draw.choice(short), draw.choice(short)
        word = "".join(pair)
        if word not in vocabulary:
            vocabulary[word] = len(vocabulary)
            merges.append(pair)
    return vocabulary, merges
