"""What to know before a model is run in few bits, and that it is said only where it applies."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from quantbatch.model.advice import LONG_TOKENS, advise
from quantbatch.model.cards import find
from quantbatch.model.checkpoint import Checkpoint
from quantbatch.model.memory import Work
from quantbatch.model.widths import every_width
from quantbatch.spec import FourBit, Int8
from tests.unit.model.test_memory import (
    describe,
    llama_1b,
    llama_8b,
    model,
    qwen_30b_a3b,
    qwen_32b,
    tiny,
)

WORK = Work(max_tokens=1024, prompt_tokens=800, step_tokens=2048, greedy=True)


def advice(
    checkpoint: Checkpoint, card: str | None = "RTX 4090", work: Work = WORK, **fields: Any
) -> list[str]:
    asked, on = model(**fields), find(card) if card else None
    memory = on.memory_bytes if on else None
    widths = every_width(checkpoint, asked, work, memory, row_tokens=700)
    return advise(checkpoint, asked, on, work, widths)


def like(checkpoint: Checkpoint, **config: Any) -> Checkpoint:
    return dataclasses.replace(checkpoint, config=checkpoint.config | config)


def said(sentences: list[str], pattern: str) -> bool:
    return sum(re.search(pattern, sentence) is not None for sentence in sentences) == 1


def test_nothing_is_said_where_nothing_applies() -> None:
    assert advice(qwen_32b(), bits=4) == []
    assert advice(qwen_32b(), card="H100", bits=16) == []
    assert advice(llama_8b(), card=None, bits=16) == []


def test_sizes_of_a_model_with_code_of_its_own_are_approximate() -> None:
    own = like(llama_8b(), model_type="own")
    assert said(
        advice(dataclasses.replace(own, trusted=True), bits=16), "no model type own.*approx"
    )
    assert advice(dataclasses.replace(llama_8b(), trusted=True), bits=16, card="H100") == []


def test_experts_stay_in_16_bits() -> None:
    found = advice(qwen_30b_a3b(), bits=4)
    assert said(found, r"95% of the parameters are experts.*55\.6\d GiB at 15\.65 bits.*GPTQ")
    assert not said(advice(qwen_30b_a3b(), card="H100", bits=16), "experts")


def test_large_vocabularies_stay_in_16_bits() -> None:
    assert said(advice(llama_8b(), bits=4), r"embedding and head have 13% .* 5\.68 bits")
    assert said(advice(llama_1b(), bits=4), r"embedding, which is the output head too, has 21%")
    assert not said(advice(llama_8b(), bits=16), "embedding")


def test_gemma_needs_more_than_float16() -> None:
    gemma = like(tiny(), model_type="gemma3_text")
    assert said(advice(gemma, dtype="float16"), "Gemma exceed 65,504.*use bfloat16")
    assert said(advice(gemma, bits=8), "in which int8 multiplies")
    assert said(advice(gemma, card="T4", bits=4), "use float32, or a card from Ampere on")
    assert not said(advice(gemma, bits=4), "Gemma")
    assert not said(advice(gemma, card="T4", dtype="float32"), "Gemma")


def test_a_card_without_bfloat16() -> None:
    assert said(advice(tiny(), card="V100", bits=4), "V100 has no bfloat16")
    assert not said(advice(tiny(), card="L4", bits=4), "bfloat16")
    assert not said(advice(tiny(), card="V100", dtype="float16"), "bfloat16")


def test_int8_is_slow_and_not_the_same_in_any_company() -> None:
    found = advice(qwen_32b(), card="L40S", bits=8)
    assert said(found, "depends slightly on the other rows")
    assert said(found, "625 tokens/s where 16 bits make 1,054.*4 bits leave more room")
    assert said(advice(tiny(), bits=8), "625 tokens/s.*16 bits fit here")
    assert not said(advice(tiny(), quantization=Int8(threshold=0.0)), "other rows|625")


def test_four_bits_where_sixteen_fit() -> None:
    assert said(advice(llama_8b(), bits=4), "64 % of the tokens/s.*model.bits 16 if speed counts")
    flat = FourBit(double_quant=False)
    assert said(advice(llama_8b(), quantization=flat), "66 % of the tokens/s")
    assert not said(advice(llama_8b(), card="T4", bits=4), "of the tokens/s")


def test_fp4_is_worse_than_nf4() -> None:
    assert said(advice(tiny(), quantization=FourBit(kind="fp4")), "1.6 times as large.*use nf4")
    assert not said(advice(tiny(), bits=4), "fp4")


def test_odd_shapes_are_slow() -> None:
    odd = tiny(inner=100)
    # Two layers with a down_proj of 64 x 100; the head sizes of 16 x 4 are 64 wide.
    assert said(advice(odd, bits=4), r"2 of 14 matrices, such as 64 x 100, .* multiple of 64")
    assert not said(advice(odd, bits=8), "multiple of 64")
    assert not said(advice(tiny(), bits=4), "multiple of 64")


@pytest.mark.parametrize(("tokens", "warned"), [(LONG_TOKENS, True), (LONG_TOKENS - 1, False)])
def test_long_prompts_lose_most(tokens: int, warned: bool) -> None:
    work = dataclasses.replace(WORK, prompt_tokens=tokens, max_tokens=tokens + 200)
    assert said(advice(tiny(), bits=4, work=work), "up to 59 %.*2505.20276") == warned


def test_fp8_on_a_card_without_it() -> None:
    section = {"quant_method": "fp8"}
    fp8 = describe(
        {**tiny().config, "quantization_config": section},
        [(t.name, t.shape) for t in tiny().tensors],
    )
    assert said(advice(fp8, card="A100"), "A100 does not multiply 8-bit floating-point")
    assert not said(advice(fp8, card="L4"), "8-bit")


def test_the_estimate_of_transformers_is_lower_than_the_truth() -> None:
    # 17.43 GiB by its count, of the 18 that the card has, and 17.90 in truth.
    card = dataclasses.replace(find("T4"), memory_gib=18.0)
    widths = every_width(qwen_32b(), model(bits=4), WORK, card.memory_bytes, row_tokens=700)
    found = advise(qwen_32b(), model(bits=4), card, WORK, widths)
    assert said(found, r"estimate is 17\.43 GiB, which would fit.*17\.90 GiB")
    assert not said(advice(qwen_32b(), card="T4", bits=4), "estimate")


def test_each_is_one_sentence_with_a_remedy() -> None:
    for sentence in advice(llama_8b(), bits=8) + advice(tiny(inner=100), bits=4, card="T4"):
        assert re.search(r"\d", sentence)
        assert ": " in sentence
        assert not sentence.endswith(".")
