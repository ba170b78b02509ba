"""A model in every width: the table of `plan`, and what `bits: auto` chooses from it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbatch.model.cards import find
from quantbatch.model.checkpoint import Checkpoint
from quantbatch.model.memory import Work, plan_memory
from quantbatch.model.widths import USEFUL_ROWS, Width, every_width, useful_bits
from quantbatch.spec import FourBit, Int8, Model
from tests.unit.model.test_memory import (
    describe,
    llama_8b,
    llama_like,
    model,
    qwen_30b_a3b,
    qwen_32b,
    tiny,
)

GIB = 2**30
STATIC = Work(max_tokens=1024, prompt_tokens=800)
PACKED = dataclasses.replace(STATIC, step_tokens=2048, greedy=True)


def table(
    checkpoint: Checkpoint,
    asked: Model | None = None,
    *,
    card: str | None = "RTX 4090",
    work: Work = PACKED,
    row_tokens: int = 700,
) -> dict[str, Width]:
    device_bytes = find(card).memory_bytes if card else None
    widths = every_width(
        checkpoint, asked or model(bits=4), work, device_bytes, row_tokens=row_tokens
    )
    return {width.kind: width for width in widths}


def test_a_32b_model_on_a_24_gb_card() -> None:
    """The table of research on a 4090, from the sizes of Qwen2.5 32B."""
    found = table(qwen_32b())
    assert list(found) == ["bf16", "int8", "nf4", "nf4+dq"]
    for kind, gib, bits, saved in (
        ("bf16", 61.03, 16.00, 0.500),
        ("int8", 31.98, 8.39, 0.738),
        ("nf4", 19.25, 5.05, 0.842),
        ("nf4+dq", 17.90, 4.69, 0.853),
    ):
        width = found[kind]
        assert width.weight_bytes / GIB == pytest.approx(gib, abs=0.006), kind
        assert width.bits_per_param == pytest.approx(bits, abs=0.006), kind
        assert width.saved_of_32_bits == pytest.approx(saved, abs=0.0006), kind
        assert width.saved_of_16_bits == pytest.approx(2 * saved - 1, abs=0.0012), kind
    assert [w.verdict for w in found.values()] == ["no", "no", "fits", "fits"]
    assert [w.kind for w in found.values() if w.chosen] == ["nf4+dq"]
    assert found["bf16"].quantized_params == 0
    assert found["nf4"].quantized_share == pytest.approx(31.206 / 32.764, abs=1e-4)
    assert (found["bf16"].rows, found["bf16"].kv_tokens) == (0, 0)


@pytest.mark.parametrize("work", [STATIC, PACKED], ids=["static", "continuous"])
def test_the_chosen_row_is_the_plan_of_the_job(work: Work) -> None:
    asked = model(bits=4)
    card = find("RTX 4090").memory_bytes
    width = table(qwen_32b(), asked, work=work)["nf4+dq"]
    plan = plan_memory(qwen_32b(), asked, work, card)
    assert width.weight_bytes == plan.weight_bytes
    assert width.workspace_bytes == plan.workspace_bytes
    assert width.needed_bytes == plan.total
    assert width.kv_tokens is not None
    free = card - (plan.total - plan.kv_bytes)
    assert width.kv_tokens == free // plan.kv_bytes_per_token >= plan.kv_tokens - 16
    assert width.rows == (plan.batch_size if work is STATIC else plan.kv_tokens // 700)


def test_rows_share_the_pool_and_longer_rows_are_fewer() -> None:
    rows = [table(qwen_32b(), row_tokens=n)["nf4+dq"].rows or 0 for n in (200, 400, 1024, 5000)]
    assert rows[0] >= rows[1] > rows[2] == rows[3] > 0  # a row is never longer than the limit


def test_tight_is_fewer_rows_than_pay() -> None:
    long = dataclasses.replace(PACKED, max_tokens=8192, prompt_tokens=8000)
    width = table(qwen_32b(), work=long, row_tokens=4000)["nf4+dq"]
    assert (width.verdict, width.rows) == ("tight", 3)
    assert USEFUL_ROWS > 3
    asked = dataclasses.replace(long, batch_size=3)
    assert table(qwen_32b(), work=asked, row_tokens=4000)["nf4+dq"].verdict == "fits"


def test_without_a_card_there_is_no_verdict() -> None:
    for width in table(llama_8b(), card=None).values():
        assert (width.kv_tokens, width.rows, width.verdict) == (None, None, None)


def test_float32_is_a_row_only_where_it_is_had() -> None:
    assert list(table(tiny())) == ["bf16", "int8", "nf4", "nf4+dq"]
    wide = describe(
        {**tiny().config, "dtype": "float32"}, [(t.name, t.shape) for t in tiny().tensors]
    )
    found = table(wide, model(bits=16))
    assert list(found) == ["fp32", "bf16", "int8", "nf4", "nf4+dq"]
    assert found["fp32"].chosen  # bits 16 leaves a checkpoint in float32 as it is
    assert found["fp32"].weight_bytes == 2 * found["bf16"].weight_bytes
    found = table(tiny(), model(bits=32))
    assert list(found) == ["fp32", "bf16", "int8", "nf4", "nf4+dq"]
    assert found["nf4"].weight_bytes == table(tiny())["nf4"].weight_bytes
    assert "fp16" in table(tiny(), model(dtype="float16"))


def test_what_a_job_asks_for_is_in_the_table_once() -> None:
    for asked, kind in (
        (model(quantization=FourBit(kind="fp4")), "fp4+dq"),
        (model(quantization=Int8(threshold=0.0)), "int8"),
        (model(quantization=FourBit(skip_modules=["down_proj"])), "nf4+dq"),
        (model(), "bf16"),
    ):
        chosen = [width for width in table(tiny(), asked).values() if width.chosen]
        assert [width.kind for width in chosen] == [kind]
    plain, skipping = (
        table(tiny()),
        table(tiny(), model(quantization=Int8(skip_modules=["up_proj"]))),
    )
    assert skipping["nf4"].weight_bytes > plain["nf4"].weight_bytes


def test_a_quantized_checkpoint_has_its_own_row_only() -> None:
    section = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    checkpoint = describe(
        {**tiny().config, "quantization_config": section},
        [(t.name, t.shape) for t in tiny().tensors],
    )
    for asked in (model(), model(bits="auto")):
        assert list(table(checkpoint, asked)) == ["bitsandbytes"]


def test_where_nothing_can_be_quantized_there_is_one_row() -> None:
    falcon = describe(
        {**tiny().config, "model_type": "falcon"}, [(t.name, t.shape) for t in tiny().tensors]
    )
    assert list(table(falcon, model())) == ["bf16"]


def test_windows_are_told_apart_from_what_grows() -> None:
    gemma = llama_like(
        hidden=64, inner=128, layers=6, heads=4, kv_heads=2, vocab=100, head_dim=16,
        model_type="gemma3_text", sliding_window=32,
    )  # fmt: skip
    width = table(gemma)["bf16"]
    assert width.sliding_bytes_per_token == 5 * width.growing_bytes_per_token
    assert width.window_tokens == 32


@settings(deadline=None, max_examples=25)
@given(
    hidden=st.integers(1, 6),
    mib=st.integers(500, 900),
    row_tokens=st.integers(1, 1200),
    packed=st.booleans(),
)
def test_the_laws_of_the_table(hidden: int, mib: int, row_tokens: int, packed: bool) -> None:
    checkpoint = tiny(hidden=64 * hidden, vocab=5000)
    work = PACKED if packed else STATIC

    def on(mib: int) -> list[Width]:
        memory = mib * 2**20
        return every_width(checkpoint, model(bits=4), work, memory, row_tokens=row_tokens)

    for width, larger in zip(on(mib), on(mib + 7), strict=True):
        assert width.rows is not None
        assert (width.verdict == "no") == (width.rows == 0)
        assert (width.verdict == "fits") == (width.rows >= USEFUL_ROWS)
        assert width.rows == 0 or width.needed_bytes <= mib * 2**20
        assert width.rows <= (larger.rows or 0)
        assert 0 <= width.quantized_share < 1
        assert width.saved_of_16_bits == pytest.approx(2 * width.saved_of_32_bits - 1)


# ---- bits: auto


def chosen(checkpoint: Checkpoint, card: str, work: Work = PACKED, row_tokens: int = 700) -> Any:
    memory = find(card).memory_bytes
    return useful_bits(checkpoint, model(bits="auto"), work, memory, row_tokens=row_tokens)


@pytest.mark.parametrize(
    ("checkpoint", "card", "bits"),
    [
        (qwen_32b(), "RTX 4090", 4),
        (qwen_32b(), "L40S", 8),
        (qwen_32b(), "H100", 16),
        (llama_8b(), "RTX 4090", 16),
        (llama_8b(), "T4", 8),
        (qwen_30b_a3b(), "H100", 16),
        (qwen_32b(), "T4", None),
        (qwen_30b_a3b(), "L40S", None),
    ],
)
def test_the_widest_with_a_useful_batch(
    checkpoint: Checkpoint, card: str, bits: int | None
) -> None:
    assert chosen(checkpoint, card) == bits


def test_longer_rows_and_larger_batches_take_fewer_bits() -> None:
    long = dataclasses.replace(PACKED, max_tokens=8192, prompt_tokens=8000)
    assert chosen(llama_8b(), "RTX 4090", long, row_tokens=8000) == 8
    many = dataclasses.replace(PACKED, batch_size=128)
    assert chosen(llama_8b(), "RTX 4090", many) == 8


def test_where_no_batch_is_useful_the_one_with_the_most_rows_is_taken() -> None:
    long = dataclasses.replace(PACKED, max_tokens=8192, prompt_tokens=8000)
    assert chosen(qwen_32b(), "RTX 4090", long, row_tokens=8000) == 4
