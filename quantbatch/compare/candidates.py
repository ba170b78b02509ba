"""Bit widths by name, the model section that each stands for, and which of them fit."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from quantbatch.errors import DoesNotFit, JobError, ModelError, SpecError
from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.model.footprint import ITEM_BYTES, weigh, weight_dtype
from quantbatch.model.memory import plan_memory
from quantbatch.spec import FourBit, Int8, Model, Unquantized

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.model.footprint import DType
    from quantbatch.model.formats import Capability
    from quantbatch.model.memory import MemoryPlan, Work
    from quantbatch.spec import Quantization

DTYPES: dict[str, DType] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
QUANTIZED: dict[str, Int8 | FourBit] = {
    "int8": Int8(),
    "nf4": FourBit(),
    "nf4-nodq": FourBit(double_quant=False),
    "fp4": FourBit(kind="fp4"),
}
BITS = {"32": "fp32", "8": "int8", "4": "nf4"}
"""Short forms; 16 is the checkpoint's own type, see `_own_16_bits`."""
NAMES = (*DTYPES, *QUANTIZED)


@dataclass(frozen=True)
class Candidate:
    """A width to compare."""

    name: str
    """One of `NAMES`."""
    model: Model
    """The job's model section at that width."""


class Planned(NamedTuple):
    """A candidate that fits."""

    candidate: Candidate
    memory: MemoryPlan


@dataclass(frozen=True)
class Field:
    """All candidates of a comparison."""

    fitting: tuple[Planned, ...]
    """The reference comes first."""
    skipped: dict[str, str]
    """Names of those that can't take part, with the reason."""


def candidates_of(text: str, model: Model, checkpoint: Checkpoint) -> list[Candidate]:
    """Return what a list of widths stands for.

    Args:
        text: Such as `16,8,4` or `bf16,nf4`.
        model: The job's section. Where it has options for a kind, such as skip_modules, that kind
            is compared with them.
        checkpoint: The model's files.

    Raises:
        SpecError: A name is unknown.
    """
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise SpecError(JobError("--bits names no width", f"such as 16,8,4 or {','.join(NAMES)}"))
    found = [name_of(name, "--bits", checkpoint) for name in names]
    return [Candidate(name, _section(name, model)) for name in dict.fromkeys(found)]


def name_of(text: str, option: str, checkpoint: Checkpoint) -> str:
    """Return the name of a width that may be given as a number of bits.

    Raises:
        SpecError: It is unknown.
    """
    name = _own_16_bits(checkpoint) if text == "16" else BITS.get(text, text)
    if name in NAMES:
        return name
    near = difflib.get_close_matches(text.lower(), NAMES, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    known = f"it is one of {', '.join(NAMES)}, or 4, 8, 16, 32"
    raise SpecError(JobError(f"{option}: there is no width {text!r}", guess + known))


def _own_16_bits(checkpoint: Checkpoint) -> str:
    """Name the checkpoint's own 16-bit type; bfloat16 has the range of a float32 checkpoint."""
    return "fp16" if own_dtype(checkpoint) == "float16" else "bf16"


def own_dtype(checkpoint: Checkpoint) -> DType:
    """Return the type that the checkpoint's weights are stored in."""
    return weight_dtype(checkpoint, Model(id=checkpoint.id))


def _section(name: str, model: Model) -> Model:
    quantization: Quantization = QUANTIZED.get(name, Unquantized())
    own = model.quantization
    if own is not None and width_of(own) == name:
        quantization = own
    # A type that is named is loaded in that type, also where `auto` would choose a faster one.
    dtype = DTYPES.get(name, model.dtype)
    changes = {"bits": None, "quantization": quantization, "dtype": dtype}
    return model.model_copy(update=changes)


def width_of(quantization: Quantization) -> str | None:
    """Name a quantization; None for no quantization, which is named by its type."""
    match quantization:
        case Int8():
            return "int8"
        case FourBit(kind="nf4", double_quant=double_quant):
            return "nf4" if double_quant else "nf4-nodq"
        case FourBit():
            return "fp4"
        case Unquantized():
            return None


def is_original(name: str, checkpoint: Checkpoint) -> bool:
    """Tell whether a width holds every number of the checkpoint as it is stored."""
    if checkpoint.quantized is not None or name not in DTYPES:
        return False
    return name == "fp32" or DTYPES[name] == own_dtype(checkpoint)


def plan_field(
    candidates: Sequence[Candidate],
    reference: str | None,
    work: Work,
    device_bytes: int | None,
    capability: Capability | None = None,
) -> Field:
    """Find out which candidates fit, and which of them is the reference.

    Args:
        candidates: In the order in which they were named.
        reference: Name of the one that was asked for; None takes the first, and the widest that
            fits if that does not.
        work: Of the job's replica.
        device_bytes: What it may fill; None where there is no limit.
        capability: Compute capability of the card; None if there is none.

    Raises:
        JobError: None fits, or not the reference that was asked for.
    """
    fitting: list[Planned] = []
    problems: dict[str, JobError] = {}
    for candidate in candidates:
        try:
            checkpoint = open_checkpoint(candidate.model, capability)
            _refuse_no_original(candidate, checkpoint)
            memory = plan_memory(checkpoint, candidate.model, work, device_bytes)
            fitting.append(Planned(candidate, memory))
        except (DoesNotFit, ModelError) as error:
            problems[candidate.name] = error
    if not fitting:
        raise next(iter(problems.values()))
    if reference in problems:
        raise problems[reference]
    chosen = _reference(fitting, reference or candidates[0].name)
    others = [planned for planned in fitting if planned is not chosen]
    skipped = {name: error.problem.split("\n", 1)[0] for name, error in problems.items()}
    return Field((chosen, *others), skipped)


def _refuse_no_original(candidate: Candidate, checkpoint: Checkpoint) -> None:
    """Refuse to name codes after a type: what is quantized already would be loaded as it is."""
    as_it_is = checkpoint.quantized is not None and not checkpoint.expanded
    if as_it_is and candidate.name in DTYPES:
        raise ModelError(
            f"{checkpoint.id} is quantized already ({checkpoint.quantized}): it has no"
            f" {candidate.name} weights to compare with",
            "give the original model",
        )


def _reference(fitting: Sequence[Planned], name: str) -> Planned:
    named = [planned for planned in fitting if planned.candidate.name == name]
    return named[0] if named else max(fitting, key=lambda planned: planned.memory.weight_bytes)


def planned_bits(checkpoint: Checkpoint, model: Model) -> float:
    """Return the bits that a parameter of the whole model takes, embeddings and scales included."""
    weights = weigh(checkpoint, model)
    return 8 * weights.total_bytes / weights.total_params


def float32_bytes(checkpoint: Checkpoint, model: Model) -> int:
    """Return what the same parameters take as float32, which savings are told against."""
    return ITEM_BYTES["float32"] * weigh(checkpoint, model).total_params
