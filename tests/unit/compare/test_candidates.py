"""Names of widths, the sections they stand for, and which of them fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantbatch.compare.candidates import (
    NAMES,
    candidates_of,
    is_original,
    name_of,
    plan_field,
)
from quantbatch.errors import DoesNotFit, ModelError, SpecError
from quantbatch.model.checkpoint import Checkpoint, open_checkpoint
from quantbatch.model.memory import Work, plan_memory
from quantbatch.spec import FourBit, Int8, Model, Unquantized

MODEL = Path(__file__).parents[3] / "configs" / "quickstart" / "model"
WORK = Work(max_tokens=64, prompt_tokens=48, batch_size=2, step_tokens=64, greedy=True)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(Model(id=str(MODEL)))


def model(**fields: object) -> Model:
    return Model.model_validate({"id": str(MODEL)} | fields)


def stored_as(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    return replace(checkpoint, config=checkpoint.config | {"dtype": dtype})


def test_numbers_and_names(checkpoint: Checkpoint) -> None:
    found = candidates_of("32, 16,8,4 ,fp16,nf4-nodq,fp4,nf4", model(), checkpoint)
    assert [each.name for each in found] == [
        "fp32", "bf16", "int8", "nf4", "fp16", "nf4-nodq", "fp4",
    ]  # fmt: skip
    sections = {each.name: each.model for each in found}
    assert sections["fp32"].dtype == "float32"
    assert sections["bf16"].dtype == "bfloat16"
    assert sections["fp16"].dtype == "float16"
    assert sections["fp16"].quantization == Unquantized()
    assert sections["int8"].quantization == Int8()
    assert sections["nf4"].quantization == FourBit()
    assert sections["nf4-nodq"].quantization == FourBit(double_quant=False)
    assert sections["fp4"].quantization == FourBit(kind="fp4")
    assert sections["nf4"].dtype == "auto"
    assert all(each.bits is None for each in sections.values())


@pytest.mark.parametrize(
    ("stored", "name"), [("float16", "fp16"), ("bfloat16", "bf16"), ("float32", "bf16")]
)
def test_16_is_the_checkpoint_s_own_type(checkpoint: Checkpoint, stored: str, name: str) -> None:
    assert name_of("16", "--bits", stored_as(checkpoint, stored)) == name


def test_options_of_the_job_are_kept_for_their_kind(checkpoint: Checkpoint) -> None:
    own = model(quantization={"kind": "nf4", "skip_modules": ["down_proj"]})
    four, eight = candidates_of("4,8", own, checkpoint)
    assert four.model.quantization == own.quantization
    assert eight.model.quantization == Int8()


def test_an_unknown_name_is_answered_with_the_nearest(checkpoint: Checkpoint) -> None:
    with pytest.raises(SpecError) as caught:
        candidates_of("16,int4,nf3", model(), checkpoint)
    (problem,) = caught.value.problems
    assert problem.problem == "--bits: there is no width 'int4'"
    assert problem.hint.startswith("did you mean int8? ")
    assert all(name in problem.hint for name in NAMES)
    with pytest.raises(SpecError, match="names no width"):
        candidates_of(" , ", model(), checkpoint)


def test_what_holds_the_checkpoint_s_own_numbers(checkpoint: Checkpoint) -> None:
    held = [name for name in NAMES if is_original(name, checkpoint)]
    assert held == ["fp32", "bf16"]
    assert [n for n in NAMES if is_original(n, stored_as(checkpoint, "float32"))] == ["fp32"]
    assert not any(is_original(name, replace(checkpoint, quantized="gptq")) for name in NAMES)


# ---- what fits


def between(checkpoint: Checkpoint, wide: str, narrow: str, work: Work = WORK) -> int:
    """Bytes of a card that has room for the one and not for the other."""
    least = []
    for candidate in candidates_of(f"{wide},{narrow}", model(), checkpoint):
        too_small, enough = 0, 2**34
        while enough - too_small > 1000:
            middle = (too_small + enough) // 2
            try:
                plan_memory(checkpoint, candidate.model, work, middle)
                enough = middle
            except DoesNotFit:
                too_small = middle
        least.append(enough)
    assert least[0] > least[1] + 10_000
    return sum(least) // 2


def test_the_first_is_the_reference(checkpoint: Checkpoint) -> None:
    found = plan_field(candidates_of("8,16,4", model(), checkpoint), None, WORK, None)
    assert [planned.candidate.name for planned in found.fitting] == ["int8", "bf16", "nf4"]
    assert found.skipped == {}
    named = plan_field(candidates_of("8,16,4", model(), checkpoint), "nf4", WORK, None)
    assert [planned.candidate.name for planned in named.fitting] == ["nf4", "int8", "bf16"]


def test_what_does_not_fit_is_skipped_and_the_widest_is_the_reference(
    checkpoint: Checkpoint,
) -> None:
    room = between(checkpoint, "bf16", "int8")
    found = plan_field(candidates_of("32,16,4,8", model(), checkpoint), None, WORK, room)
    assert [planned.candidate.name for planned in found.fitting] == ["int8", "nf4"]
    assert list(found.skipped) == ["fp32", "bf16"]
    assert "does not fit: it needs" in found.skipped["bf16"]
    assert "\n" not in found.skipped["bf16"]


def test_none_fits_or_not_the_reference_that_was_asked_for(checkpoint: Checkpoint) -> None:
    with pytest.raises(DoesNotFit, match="does not fit"):
        plan_field(candidates_of("16,4", model(), checkpoint), None, WORK, 10_000)
    room = between(checkpoint, "bf16", "nf4")
    with pytest.raises(DoesNotFit, match="16 bits"):
        plan_field(candidates_of("16,4", model(), checkpoint), "bf16", WORK, room)


def test_codes_are_not_named_after_a_type(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that is quantized already is loaded as it is, whatever type is asked for."""

    def opened(*_: object) -> Checkpoint:
        return replace(checkpoint, quantized="gptq")

    monkeypatch.setattr("quantbatch.compare.candidates.open_checkpoint", opened)
    found = candidates_of("16,32", model(), checkpoint)
    with pytest.raises(ModelError, match="it has no bf16 weights to compare with"):
        plan_field(found, None, WORK, None)
