"""`quantbatch compare` from the command line to the report, with the quickstart's trained model."""

from __future__ import annotations

import inspect
import itertools
import json
import statistics
import urllib.request
import weakref
import xml.etree.ElementTree as ET
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from typer.testing import CliRunner

from quantbatch import sizing
from quantbatch.cli import app
from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.spec import FourBit
from quantbatch.specfile import load_spec
from quantbatch.weights import loading as weights
from tests.integration.support import MODEL
from tests.unit.compare.test_candidates import between

if TYPE_CHECKING:
    from pathlib import Path

    from typer.testing import Result

MODULES = {"statistics": statistics, "inspect": inspect, "urllib": urllib.request}
ROWS = 16


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job that asks in which package docstrings stand; the working directory is its folder."""
    monkeypatch.chdir(tmp_path)
    found = [
        {"docstring": inspect.cleandoc(value.__doc__), "package": package}
        for package, module in MODULES.items()
        for value in vars(module).values()
        if callable(value) and value.__doc__ and value.__module__ == module.__name__
    ]
    assert len(found) >= ROWS
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist(found), tmp_path / "in" / "a.parquet")
    fields = {
        "name": "widths",
        "input": {"uri": "in"},
        "model": {"id": str(MODEL), "bits": 4},
        "prompt": {"template": "{{ docstring }}"},
        "sampling": {"max_new_tokens": 8},
        "engine": {"batch_size": 16, "too_long": "truncate_right"},
        "cluster": {"cpu_fallback": True},
        "output": {"uri": "answers"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(fields))
    return tmp_path / "job.yaml"


def call(*args: str) -> Result:
    return CliRunner().invoke(app, ["compare", "job.yaml", *args])


def compared(*args: str) -> dict[str, Any]:
    result = call("--json", "--rows", str(ROWS), *args)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert (result.exit_code, found["outcome"]) == (0, "compared"), result.output
    return found


def widths(found: dict[str, Any]) -> dict[str, Any]:
    return {width["name"]: width for width in found["widths"]}


@pytest.mark.usefixtures("job")
def test_the_demo_model_s_widths_are_in_order(tmp_path: Path) -> None:
    # The type is named since `auto` is float32 on a CPU without bfloat16.
    types = "--set", "model.dtype=bfloat16"
    bits = "32,fp16,bf16,8,4,fp4"
    found = compared("--bits", bits, "--prompts", "--gold", "package", *types)
    assert found["reference"] == "fp32"
    assert found["reference_is"] == "fp32, which holds the checkpoint's own numbers"
    reference, *others = found["widths"]
    kl = [width["divergence_on_prompts"]["kl_mean"] for width in others]
    assert [width["name"] for width in others] == ["fp16", "bf16", "int8", "nf4", "fp4"]
    # Each begins above where the one before ends.
    for before, after in itertools.pairwise(kl):
        assert before["high"] < after["low"]
    noise = found["noise_floor"]
    assert noise["divergence"]["kl_mean"]["value"] < 1e-10
    assert noise["answers"]["identical"]["value"] == 1
    assert reference["dtype"] == "float32"
    assert [width["dtype"] for width in others[:2]] == ["float16", "bfloat16"]
    saved = [width["memory"]["saved"] for width in others]
    assert saved == pytest.approx([0.5, 0.5, 0.696, 0.793, 0.793], abs=0.002)
    for width in found["widths"]:
        memory = width["memory"]
        assert memory["weight_bytes"] == memory["planned_weight_bytes"]
        assert memory["planned_bytes"] > 0
        assert width["speed"]["tokens_per_s"] > 0
        assert width["counts"]["rows"] == ROWS == width["accuracy"]["rows"]
        assert width["accuracy"]["value"]["value"] > 0.4
    assert "mcnemar_mid_p" not in reference["accuracy"]
    assert 0 <= others[-1]["accuracy"]["mcnemar_mid_p"] <= 1
    folder = tmp_path / "out" / "compare" / "widths"
    assert json.loads((folder / "compare.json").read_text()) == found
    ET.fromstring((folder / "index.html").read_text().removeprefix("<!DOCTYPE html>\n"))


@pytest.mark.usefixtures("job")
def test_a_terminal_shows_a_table_and_what_may_be_claimed(tmp_path: Path) -> None:
    result = call("--bits", "32,8", "--rows", "12", "--out", "there")
    assert result.exit_code == 0, result.output
    assert "fp32 again" in result.stdout
    assert "seen with 12 rows" in result.stdout
    assert "evenly spread over the input" in result.stdout
    assert (tmp_path / "there" / "index.html").exists()


@pytest.mark.usefixtures("job")
def test_damaged_weights_are_seen_and_one_model_is_there_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load, seen = weights.load, list[Any]()

    def damaging(checkpoint: Any, model: Any, device: str, **others: Any) -> Any:
        assert not [one for one in seen if one() is not None], "the model before is still there"
        loaded = load(checkpoint, model, device, **others)
        seen.append(weakref.ref(loaded.model))
        if isinstance(model.quantization, FourBit):
            with torch.no_grad():
                for layer in loaded.model.model.layers[:2]:
                    layer.post_attention_layernorm.weight.zero_()
        return loaded

    monkeypatch.setattr(weights, "load", damaging)
    found = widths(compared("--bits", "32,16,4", "--gold", "package"))
    sound, damaged = found["bf16"], found["nf4"]
    assert len(seen) == 3
    assert damaged["divergence"]["kl_mean"]["low"] > 100 * sound["divergence"]["kl_mean"]["high"]
    assert damaged["answers"]["identical"]["value"] < sound["answers"]["identical"]["value"]
    assert damaged["labels"]["flipped"] > 0
    assert damaged["verdict"][0].startswith("differs by ")


@pytest.mark.usefixtures("job")
def test_an_interrupted_comparison_goes_on_with_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, loads = weights.load, list[str]()

    def interrupted(checkpoint: Any, model: Any, device: str, **others: Any) -> Any:
        loads.append(model.dtype)
        if len(loads) == 3:
            raise KeyboardInterrupt
        return load(checkpoint, model, device, **others)

    monkeypatch.setattr(weights, "load", interrupted)
    command = ["--json", "--bits", "32,4,16", "--rows", "8"]
    folder = tmp_path / "out" / "compare" / "widths"
    assert call(*command).exit_code == 130
    assert [path.name for path in folder.glob("_unfinished/*.json")] == ["nf4.json"]
    again = call(*command)
    assert "nf4: done before" in again.stderr
    assert loads[3:] == ["float32", "bfloat16"]
    assert sorted(path.name for path in folder.iterdir()) == ["compare.json", "index.html"]
    found = json.loads(again.stdout.splitlines()[-1])
    assert [width["name"] for width in found["widths"]] == ["fp32", "nf4", "bf16"]


@pytest.mark.usefixtures("job")
@pytest.mark.parametrize("bits", ["16", "8"])
def test_a_width_differs_from_itself_by_noise_only(bits: str) -> None:
    """By rounding in bf16; and int8 chooses outliers over the whole batch, its padding included."""
    found = compared("--bits", bits, "--set", "engine.kind=static")
    assert len(found["widths"]) == 1
    noise = found["noise_floor"]
    assert noise["divergence"]["kl_mean"]["value"] < 1e-4
    assert noise["labels"]["same"]["value"] > 0.9
    if bits == "8":
        assert "no measure of what is lost against the original" in found["reference_is"]


def test_what_does_not_fit_is_skipped_with_its_reason(job: Path) -> None:
    """On a card that has room for 4 bits and not for float32."""
    spec = load_spec(job)
    checkpoint = open_checkpoint(spec.model)
    work = sizing.work_of(spec, checkpoint, 504)
    card = f"cluster.gpu_memory_gib={between(checkpoint, '32', '4', work) / 2**30}"
    found = compared("--bits", "32,4", "--set", card)
    assert found["reference"] == "nf4"
    assert list(found["skipped"]) == ["fp32"]
    assert "does not fit: it needs" in found["skipped"]["fp32"]
    refused = call("--bits", "32", "--json", "--set", card)
    assert refused.exit_code == 3
    assert "does not fit" in json.loads(refused.stdout.splitlines()[-1])["error"]


@pytest.mark.parametrize(
    ("arguments", "problem", "hint"),
    [
        (["--bits", "16,nf5"], "--bits: there is no width 'nf5'", "did you mean nf4?"),
        (["--reference", "bf17"], "--reference: there is no width 'bf17'", "did you mean bf16?"),
        (["--gold", "pakage"], "--gold uses the column 'pakage'", "did you mean 'package'?"),
        (["--rows", "0"], "--rows is 0", "300"),
        (["--set", "engine.kind=echo"], "engine.kind is echo", "continuous"),
    ],
)
@pytest.mark.usefixtures("job")
def test_a_mistake_is_one_clear_error(
    arguments: list[str], problem: str, hint: str, tmp_path: Path
) -> None:
    result = call("--json", *arguments)
    found = json.loads(result.stdout.splitlines()[-1])
    assert (result.exit_code, found["exit_code"]) == (2, 2)
    assert found["error"].startswith(problem)
    assert hint in found["hint"]
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
