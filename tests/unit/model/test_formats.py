"""Which formats this machine loads: every answer, and what decides it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from quantbatch.model import formats
from quantbatch.model.formats import UNLOADABLE, How, Machine, judge, table

EVERYTHING = {
    "bitsandbytes": "0.50.2",
    "compressed-tensors": "0.20.0",
    "gguf": "0.19.0",
    "gptqmodel": "7.7.0",
    "kernels": "0.18.2",
    "optimum": "2.3.0",
    "triton": "3.7.1",
}
FP8 = {"type": "float", "num_bits": 8, "strategy": "channel"}
INT4 = {"type": "int", "num_bits": 4, "strategy": "group"}


def compressed(form: str, *groups: dict[str, Any]) -> dict[str, Any]:
    return {"format": form, "config_groups": dict(enumerate(groups))}


W8A8 = compressed("float-quantized", {"weights": FP8, "input_activations": FP8})
W4A16 = compressed("pack-quantized", {"weights": INT4})


@pytest.mark.parametrize(
    ("method", "section", "old_card", "new_card"),
    [
        ("bitsandbytes", {}, How.AS_IS, How.AS_IS),
        ("gptq", {}, How.AS_IS, How.AS_IS),
        ("awq", {}, How.AS_IS, How.AS_IS),
        ("compressed-tensors", W4A16, How.EXPANDED, How.EXPANDED),
        ("compressed-tensors", W8A8, How.EXPANDED, How.AS_IS),
        ("fp8", {}, How.EXPANDED, How.AS_IS),
        ("mxfp8", {}, How.EXPANDED, How.EXPANDED),
        ("mxfp4", {}, How.AS_IS, How.AS_IS),
        ("gguf", {}, How.EXPANDED, How.EXPANDED),
    ],
)
def test_the_card_decides_where_it_matters(
    method: str, section: dict[str, Any], old_card: How, new_card: How
) -> None:
    assert judge(method, section, Machine(EVERYTHING, (8, 6))).how is old_card
    assert judge(method, section, Machine(EVERYTHING, (8, 9))).how is new_card
    assert judge(method, section, Machine(EVERYTHING, (9, 0))).how is new_card
    without = judge(method, section, Machine(EVERYTHING))
    assert without.how is (How.EXPANDED if method == "mxfp4" else old_card)


@pytest.mark.parametrize(
    ("method", "section", "package", "how", "extra"),
    [
        ("bitsandbytes", {}, "bitsandbytes", How.REFUSED, "pip install bitsandbytes>=0.50"),
        ("gptq", {}, "gptqmodel", How.REFUSED, 'pip install "quantbatch[gptq]"'),
        ("awq", {}, "optimum", How.REFUSED, 'pip install "quantbatch[gptq]"'),
        ("compressed-tensors", W8A8, "compressed-tensors", How.REFUSED, "[compressed-tensors]"),
        ("gguf", {}, "gguf", How.REFUSED, 'pip install "quantbatch[gguf]"'),
        ("fp8", {}, "kernels", How.EXPANDED, ""),
        ("mxfp4", {}, "triton", How.EXPANDED, ""),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(
    method: str, section: dict[str, Any], package: str, how: How, extra: str
) -> None:
    less = {name: version for name, version in EVERYTHING.items() if name != package}
    found = judge(method, section, Machine(less, (9, 0)))
    assert found.how is how
    assert f"{package}>=" in found.reason
    assert extra in found.remedy


def test_versions_too_old_and_too_new_do_not_count() -> None:
    def lacks(version: str, needs: dict[str, str]) -> list[str]:
        return Machine({"kernels": version, "gptqmodel": version}).lacks(needs)

    assert lacks("6.9.1", {"gptqmodel": "7.0"}) == ["gptqmodel>=7.0"]
    assert lacks("7.0.0.dev3+cpu", {"gptqmodel": "7.0"}) == []
    assert lacks("10.1", {"gptqmodel": "7.0"}) == []
    assert lacks("0.18.1", formats.FP8) == ["kernels>=0.18.2"]
    assert lacks("0.18.3", formats.FP8) == []
    assert lacks("0.19.0", formats.FP8) == ["kernels>=0.18.2"]


@pytest.mark.parametrize("method", [*UNLOADABLE, "fp3", "unknown", ""])
def test_what_is_not_tested_or_not_known_is_refused(method: str) -> None:
    found = judge(method, {}, Machine(EVERYTHING, (12, 0)))
    assert found.how is How.REFUSED
    assert found.reason
    assert "the original model" in found.remedy


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (compressed("marlin-24", {"weights": INT4}), "marlin-24 is not known"),
        (compressed("pack-quantized", {"weights": INT4, "format": "new"}), "new is not known"),
        ({}, "it names none"),
        (compressed("pack-quantized", {"weights": INT4}, {"weights": FP8}), "layers of 2 kinds"),
    ],
)
def test_compressed_tensors_that_would_be_expanded_wrongly_are_refused(
    section: dict[str, Any], words: str
) -> None:
    found = judge("compressed-tensors", section, Machine(EVERYTHING, (9, 0)))
    assert found.how is How.REFUSED
    assert words in found.reason


@pytest.mark.parametrize(
    "group",
    [
        {"weights": FP8},  # 16-bit activations, which the kernel would round too
        {"weights": FP8 | {"strategy": "block"}, "input_activations": FP8},
        {"weights": FP8, "input_activations": INT4},
    ],
)
def test_only_what_the_fp8_kernel_computes_is_left_to_it(group: dict[str, Any]) -> None:
    section = compressed("float-quantized", group)
    assert judge("compressed-tensors", section, Machine(EVERYTHING, (9, 0))).how is How.EXPANDED


def test_the_table_has_every_format_once() -> None:
    rows = list(table(Machine(EVERYTHING, (9, 0))))
    names = [row.format for row in rows]
    assert len(names) == len(set(names))
    assert {*UNLOADABLE, "gptq", "awq", "gguf", "fp8", "mxfp4", "bitsandbytes"} <= set(names)
    for row in rows:
        assert (row.how is How.REFUSED) == (row.planned == "")
        assert (row.how is How.AS_IS) == (row.missing == "")
    assert {row.format: row.planned for row in rows}["gguf"] == "16 bits"


def test_every_method_of_transformers_is_judged_knowingly() -> None:
    """A new method in transformers is refused, but as unknown: then it wants a line of its own."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    for method in AUTO_QUANTIZATION_CONFIG_MAPPING:
        name = method.removesuffix("_4bit").removesuffix("_8bit")
        assert "does not know" not in judge(name, {}, Machine(EVERYTHING)).reason, name


def test_judging_imports_no_package_that_it_judges() -> None:
    program = (
        "import sys; from quantbatch.model.formats import Machine, table;"
        "rows = list(table(Machine.this()));"
        "print({'torch', 'transformers', 'gptqmodel', 'gguf', 'bitsandbytes'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
