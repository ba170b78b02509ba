"""`quantbatch compare` on a CUDA card: the order of the widths, and one model at a time."""

from __future__ import annotations

import gc
import inspect
import itertools
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from quantbatch.cli import app

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart" / "model"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def compared(folder: Path, model: Path, *arguments: str, answer_tokens: int = 8) -> dict[str, Any]:
    """Compare on docstrings of two modules, and show what came out."""
    docs = [
        inspect.cleandoc(value.__doc__)
        for module in (statistics, inspect, itertools)
        for value in vars(module).values()
        if callable(value) and value.__doc__
    ]
    (folder / "in").mkdir()
    pq.write_table(pa.table({"text": docs[:64]}), folder / "in" / "a.parquet")
    fields = {
        "name": "widths",
        "input": {"uri": str(folder / "in")},
        "model": {"id": str(model)},
        "prompt": {"template": "{{ text }}"},
        "sampling": {"max_new_tokens": answer_tokens},
        "engine": {"too_long": "truncate_right", "max_input_tokens": 256},
        "output": {"uri": str(folder / "out")},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(fields))
    command = ["compare", str(folder / "job.yaml"), "--out", str(folder / "report"), "--json"]
    result = CliRunner().invoke(app, [*command, "--prompts", *arguments])
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    assert result.exit_code == 0, result.output
    print(result.stderr)
    for width in (found["noise_floor"], *found["widths"][1:]):
        kl = {part: width[part]["kl_mean"] for part in ("divergence", "divergence_on_prompts")}
        print(width["name"], kl, width["memory"], width["speed"]["tokens_per_s"])
    return found


def test_the_demo_model_s_widths_are_in_order(tmp_path: Path) -> None:
    found = compared(tmp_path, QUICKSTART, "--bits", "32,fp16,bf16,8,4,fp4")
    assert found["device"] == "cuda"
    kl = [width["divergence_on_prompts"]["kl_mean"] for width in found["widths"][1:]]
    for before, after in itertools.pairwise(kl):
        assert before["high"] < after["low"]
    assert found["noise_floor"]["divergence_on_prompts"]["kl_mean"]["value"] < kl[0]["low"]


def test_one_model_is_on_the_card_at_a_time(
    tmp_path: Path, billion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from quantbatch.weights import loading

    load, before = loading.load, list[int]()

    def watched(*arguments: Any, **options: Any) -> Any:
        gc.collect()
        before.append(torch.cuda.memory_allocated())
        return load(*arguments, **options)

    monkeypatch.setattr(loading, "load", watched)
    for name in TOKENIZER:
        shutil.copy(QUICKSTART / name, billion)
    found = compared(tmp_path, billion, "--bits", "16,8,4", answer_tokens=64)
    assert len(before) == 3
    # cuBLAS keeps 32 MiB for each stream that it was used on; the smallest model takes 727.
    assert max(before) - before[0] < 128 * 2**20
    for width in found["widths"]:
        memory = width["memory"]
        assert memory["weight_bytes"] == memory["planned_weight_bytes"]
        # What scores take is no part of a job's plan; the engine's cache is gone by then.
        assert memory["peak_bytes"] < memory["planned_bytes"] + 2**30
