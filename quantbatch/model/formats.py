"""Checkpoints that are quantized already: which formats there are, and what this machine does with
each.

There are three answers. A format is loaded *as it is*; or it is *expanded* to 16 bits, because
nothing here multiplies by its codes, and then takes as much memory as the original, so the job has
to allow it; or it is *refused*. transformers decides the same questions, but with a line in the
log: FP8 on an older card and MXFP4 without its packages are expanded in silence, and a method that
it does not know is loaded as raw codes (5.23, read and measured). What is not tested by this
project is refused.

What decides is the packages that are installed and the compute capability of the card. Nothing here
imports them.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from quantbatch.errors import ModelError
from quantbatch.model.gguf import ARCHITECTURES
from quantbatch.model.headers import few
from quantbatch.spec import FourBit, Int8

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from quantbatch.spec import Quantization

MODULES = {
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed_tensors",
    "gguf": "gguf",
    "gptqmodel": "gptqmodel",
    "kernels": "kernels",
    "llama-cpp-python": "llama_cpp",
    "optimum": "optimum",
    "triton": "triton",
}
"""Packages that decide, with the module by which each is found."""

BITSANDBYTES = {"bitsandbytes": "0.50"}
GPTQ = {"gptqmodel": "7.0", "optimum": "2.3"}
COMPRESSED = {"compressed-tensors": "0.15"}
GGUF = {"gguf": "0.10"}
LLAMA_CPP = {"llama-cpp-python": "0.3"}
FP8 = {"kernels": "0.18.2"}
MXFP4 = {"kernels": "0.18.2", "triton": "3.4"}
"""Packages with their least version, as transformers 5.23 asks for them."""
TOO_NEW = {"kernels": "0.19"}
"""Versions from which on transformers 5.23 does not take a package."""
EXTRAS = {
    "gptqmodel": "gptq",
    "optimum": "gptq",
    "compressed-tensors": "compressed-tensors",
    "gguf": "gguf",
    "llama-cpp-python": "llama-cpp",
}
"""The extra of quantbatch by which a package is installed."""

GGUF_FLOATS = frozenset({"F32", "F16", "BF16"})
"""Types of tensors in a GGUF file that are no codes."""

Capability = tuple[int, int]
FP8_CARD: Capability = (8, 9)
"""Ada and Hopper: the first cards that multiply 8-bit floats."""
MXFP4_CARD: Capability = (7, 5)

CT_PACKED = frozenset({"pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized"})
CT_PLAIN = frozenset({"int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized"})
"""Formats within compressed-tensors, by whether several codes share an element of a tensor."""

UNTESTED = "quantbatch has not been tested with it"
WRITES_NONE = "transformers can't store it, so a checkpoint that says so is not one"
UNLOADABLE: dict[str, tuple[str, str]] = {
    "aqlm": ("1-2", UNTESTED),
    "auto-round": ("2-8", f"{UNTESTED}; auto-round also exports to GPTQ, which is loaded"),
    "bitnet": ("1.58", UNTESTED),
    "eetq": ("8", "its kernels are binaries that are fetched from the hub as it runs"),
    "fbgemm_fp8": ("8", "it needs fbgemm-gpu on a card of compute capability 9.0, and is untested"),
    "fouroversix": ("4", UNTESTED),
    "fp_quant": ("4", UNTESTED),
    "gemma": ("4", UNTESTED),
    "higgs": ("2-4", UNTESTED),
    "hqq": ("1-8", "transformers 5 does not load it (NotImplementedError)"),
    "metal": ("2-8", "it is for Apple's GPUs"),
    "nvfp4": ("4", "transformers does not load such checkpoints"),
    "quanto": ("2-8", WRITES_NONE),
    "quark": ("4-8", UNTESTED),
    "sinq": ("4", UNTESTED),
    "spqr": ("2-4", UNTESTED),
    "torchao": ("1-8", UNTESTED),
    "vptq": ("1-4", UNTESTED),
}
"""Bits of the formats that are refused everywhere, and why."""

ORIGINAL = "give the original model: quantbatch quantizes it as it loads (model.bits 4 or 8)"
RUN_PACKED = "engine: {kind: llama_cpp} runs it as it is; or give the original model"
ALLOW = (
    "model.allow_dequantize: true loads it expanded; it then takes as much memory as the original"
)


class How(Enum):
    """What is done with a checkpoint."""

    AS_IS = "as it is"
    EXPANDED = "expanded"
    REFUSED = "refused"


class Verdict(NamedTuple):
    """What a machine does with a format, and why it does no better."""

    how: How
    reason: str = ""
    """Why it is not loaded as it is; empty if it is."""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """What decides what can be loaded."""

    packages: Mapping[str, str]
    """Installed packages of `MODULES`, with their versions."""
    capability: Capability | None = None
    """Compute capability of the card; None if there is none or it is not known. Then nothing that
    needs a certain card is counted on."""

    @classmethod
    def this(cls, capability: Capability | None = None) -> Machine:
        """Return this machine, with a card that somebody else has looked at."""
        return cls(_installed(), capability)

    def lacks(self, needs: Mapping[str, str]) -> list[str]:
        """Return which of the packages are missing or too old, each as `name>=version`."""
        return [f"{name}>={least}" for name, least in needs.items() if not self._has(name, least)]

    def _has(self, name: str, least: str) -> bool:
        found = self.packages.get(name)
        if found is None or _release(found) < _release(least):
            return False
        return name not in TOO_NEW or _release(found) < _release(TOO_NEW[name])

    def has_card(self, least: Capability) -> bool:
        """Tell whether the card is known to be this one or a later one."""
        return self.capability is not None and self.capability >= least


@functools.cache
def _installed() -> dict[str, str]:
    """Return the versions of the packages of `MODULES` that can be imported."""
    found = {}
    for name, module in MODULES.items():
        if importlib.util.find_spec(module) is None:
            continue
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # a folder of that name lies about
    return found


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, as far as they go."""
    numbers = []
    for part in version.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def quant_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config.json says on how its weights are quantized; empty if they are not.

    Raises:
        ModelError: It is no section of fields.
    """
    text = config.get("text_config") or {}
    found = config.get("quantization_config") or text.get("quantization_config") or {}
    if not isinstance(found, dict):
        raise ModelError(
            f"config.json: quantization_config is {found!r}, and not a section of fields",
            "fetch the model again",
        )
    return found


def quant_method(config: Mapping[str, Any]) -> str | None:
    """Return the method that a config.json names; None if its weights are not quantized."""
    section = quant_section(config)
    if not section:
        return None
    # Checkpoints that transformers saved before 4.32 (August 2023) do not name the method.
    by_bits = section.get("load_in_4bit") or section.get("load_in_8bit")
    return str(section.get("quant_method") or ("bitsandbytes" if by_bits else "unknown"))


def stored_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """Return how bitsandbytes quantized a checkpoint; None if it did not."""
    if quant_method(config) != "bitsandbytes":
        return None
    section = quant_section(config)
    try:
        if not section.get("load_in_4bit"):
            return Int8(threshold=float(section.get("llm_int8_threshold", 6.0)))
        return FourBit(
            kind=section.get("bnb_4bit_quant_type", "fp4"),
            double_quant=bool(section.get("bnb_4bit_use_double_quant", False)),
        )
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"config.json: quantization_config says what bitsandbytes does not know: {section}",
            "fetch the model again",
        ) from error


def judge(method: str, section: Mapping[str, Any], machine: Machine) -> Verdict:
    """Decide what becomes of a quantized checkpoint.

    Args:
        method: `quant_method` of its config.json, or gguf.
        section: `quantization_config` of its config.json; for GGUF its tensors' `types`.
        machine: Where it is to be loaded.
    """
    match method:
        case "bitsandbytes":
            return _with_packages(BITSANDBYTES, machine)
        case "gptq" | "awq":
            return _with_packages(GPTQ, machine)
        case "compressed-tensors":
            return _compressed_tensors(section, machine)
        case "fp8":
            return _or_expanded(FP8, FP8_CARD, machine)
        case "mxfp4":
            return _or_expanded(MXFP4, MXFP4_CARD, machine)
        case "mxfp8":
            return Verdict(How.EXPANDED, "its kernels are not tested by quantbatch")
        case "gguf":
            return _gguf(section, machine)
        case _ if method in UNLOADABLE:
            return Verdict(How.REFUSED, UNLOADABLE[method][1], ORIGINAL)
        case _:
            reason = "quantbatch does not know this method: it would be loaded as raw codes"
            return Verdict(How.REFUSED, reason, ORIGINAL)


def _with_packages(needs: Mapping[str, str], machine: Machine) -> Verdict:
    missing = machine.lacks(needs)
    if not missing:
        return Verdict(How.AS_IS)
    return Verdict(How.REFUSED, f"it needs {' and '.join(missing)}", _install(missing))


def _install(missing: list[str]) -> str:
    extras = {EXTRAS.get(each.partition(">=")[0]) for each in missing} - {None}
    what = " ".join(f'"quantbatch[{extra}]"' for extra in sorted(filter(None, extras)))
    return f"pip install {what or ' '.join(missing)}, on every machine of the cluster"


def _or_expanded(needs: Mapping[str, str], card: Capability, machine: Machine) -> Verdict:
    """Judge what transformers expands where it can't multiply by it."""
    missing = machine.lacks(needs)
    if not machine.has_card(card):
        missing.append(f"a card of compute capability {card[0]}.{card[1]}")
    if not missing:
        return Verdict(How.AS_IS)
    return Verdict(How.EXPANDED, f"to be multiplied as it is, it needs {' and '.join(missing)}")


def _compressed_tensors(section: Mapping[str, Any], machine: Machine) -> Verdict:
    formats = ct_formats(section)
    unknown = sorted(formats - CT_PACKED - CT_PLAIN)
    if unknown or not formats:
        named = f"its format {', '.join(unknown)} is not known here" if unknown else "it names none"
        return Verdict(How.REFUSED, named, ORIGINAL)
    schemes = {json.dumps(group.get("weights"), sort_keys=True) for group in _ct_groups(section)}
    if len(schemes) > 1:
        # `CompressedTensorsDequantize` takes one group's scheme for all dense layers (5.23).
        reason = "transformers would expand all its layers by the scheme of the first"
        return Verdict(
            How.REFUSED, f"it has layers of {len(schemes)} kinds, and {reason}", ORIGINAL
        )
    found = _with_packages(COMPRESSED, machine)
    if found.how is How.REFUSED:
        return found
    if is_ct_fp8(section):
        return _or_expanded({}, FP8_CARD, machine)
    return Verdict(How.EXPANDED, "transformers expands it at the first forward pass")


def ct_formats(section: Mapping[str, Any]) -> set[str]:
    """Return the formats of a checkpoint of compressed-tensors: one, or one for each group."""
    own = [group.get("format") for group in _ct_groups(section)]
    return {str(each or section.get("format")) for each in own}


def is_ct_fp8(section: Mapping[str, Any]) -> bool:
    """Tell whether all of it is 8-bit floats for weights and activations, with a scale for each row
    or matrix: what transformers multiplies as it is.
    """
    return all(map(_is_fp8_group, _ct_groups(section))) and bool(_ct_groups(section))


def _is_fp8_group(group: Mapping[str, Any]) -> bool:
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    rows = weights.get("strategy") in ("channel", "tensor")
    return rows and all(
        (each.get("type"), each.get("num_bits")) == ("float", 8) for each in (weights, inputs)
    )


def _ct_groups(section: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = section.get("config_groups")
    groups = found.values() if isinstance(found, dict) else ()
    return [group for group in groups if isinstance(group, dict)]


def _gguf(section: Mapping[str, Any], machine: Machine) -> Verdict:
    """Judge what transformers would do with a GGUF file; see `model.gguf`."""
    architecture, ignored = section.get("architecture"), section.get("ignored")
    if architecture is not None and architecture not in ARCHITECTURES:
        reason = f"GGUF of the architecture {architecture} is not tested with transformers"
        return Verdict(How.REFUSED, f"{reason} (tested are {', '.join(ARCHITECTURES)})", RUN_PACKED)
    if ignored:
        reason = f"transformers ignores its {few(ignored)}, and would answer wrongly"
        return Verdict(How.REFUSED, reason, RUN_PACKED)
    found = _with_packages(GGUF, machine)
    if found.how is How.REFUSED or GGUF_FLOATS.issuperset(section.get("types", [""])):
        return found
    return Verdict(How.EXPANDED, "transformers expands GGUF to 16 or 32 bits")


def packed_gguf(machine: Machine) -> Verdict:
    """Decide whether a machine runs GGUF files packed, by the engine llama_cpp."""
    return _with_packages(LLAMA_CPP, machine)


# ---- the table


class Row(NamedTuple):
    """A format, as `quantbatch formats` lists it."""

    format: str
    bits: str
    how: How
    planned: str
    """How its weights are counted in a plan."""
    needs: str
    """What it takes to load it as it is."""
    missing: str
    """Why it is not loaded as it is here; empty if it is."""
    remedy: str


def table(machine: Machine) -> Iterator[Row]:
    """Yield every format with what a machine does with it."""
    group = {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}
    group |= {"input_activations": group["weights"]}
    fp8 = {"format": "float-quantized", "config_groups": {"0": group}}
    packed = {"format": "pack-quantized", "config_groups": {"0": {}}}
    known: list[tuple[str, str, str, Mapping[str, Any], str]] = [
        ("bitsandbytes", "4, 8", "bitsandbytes", {}, _needs(BITSANDBYTES)),
        ("gptq", "2, 3, 4, 8", "gptq", {}, _needs(GPTQ)),
        ("awq", "4", "awq", {}, _needs(GPTQ)),
        ("compressed-tensors", "4, 8", "compressed-tensors", packed, "(never as it is)"),
        (
            "compressed-tensors, FP8 W8A8",
            "8",
            "compressed-tensors",
            fp8,
            _needs(COMPRESSED, FP8_CARD),
        ),
        ("fp8", "8", "fp8", {}, _needs(FP8, FP8_CARD)),
        ("mxfp8", "8", "mxfp8", {}, "(never as it is)"),
        ("mxfp4", "4.25", "mxfp4", {}, _needs(MXFP4, MXFP4_CARD)),
        ("gguf", "1.6-8.5", "gguf", {}, "(never as it is)"),
    ]
    yield Row("safetensors, not quantized", "16, 32", How.AS_IS, "16 or 32 bits", "", "", "")
    for name, bits, method, section, needs in known:
        yield _row(name, bits, needs, judge(method, section, machine))
    needs = _needs(LLAMA_CPP)
    yield _row("gguf, engine llama_cpp", "1.6-8.5", needs, packed_gguf(machine))
    for method, (bits, _) in UNLOADABLE.items():
        yield _row(method, bits, "(never)", judge(method, {}, machine))


def _row(name: str, bits: str, needs: str, found: Verdict) -> Row:
    planned = {How.AS_IS: "as stored", How.EXPANDED: "16 bits", How.REFUSED: ""}[found.how]
    remedy = found.remedy
    if found.how is How.EXPANDED:
        remedy = ALLOW
    return Row(name, bits, found.how, planned, needs, found.reason, remedy)


def _needs(packages: Mapping[str, str], card: Capability | None = None) -> str:
    names = [f"{name}>={least}" for name, least in packages.items()]
    return ", ".join([*names, f"compute capability {card[0]}.{card[1]}"] if card else names)
