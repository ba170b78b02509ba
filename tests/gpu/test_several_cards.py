"""A replica over two cards.

python -m pytest -m gpu tests/gpu/test_several_cards.py
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest

from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.model.footprint import weigh_layers
from quantbatch.model.memory import Work, plan_memory
from quantbatch.prompts.tokens import load_tokenizer
from quantbatch.spec import Model, Sampling
from tests.gpu.test_continuous_cuda import QUICKSTART, equal, run, work

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"bits": 32},
    "bf16": {"dtype": "bfloat16"},
    "int8": {"bits": 8},
    "nf4": {"bits": 4},
}


@pytest.fixture(autouse=True)
def _two_cards() -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two cards")


def engine_of(model: Any, kind: str) -> Any:
    from quantbatch.engine.continuous import ContinuousEngine, EngineLimits
    from quantbatch.engine.static import StaticEngine

    if kind == "static":
        return StaticEngine(model, load_tokenizer(QUICKSTART), batch_size=8)
    limits = EngineLimits(rows=16, kv_tokens=4096, step_tokens=256, refill_share=1 / 8)
    return ContinuousEngine(model, load_tokenizer(QUICKSTART), limits)


@pytest.mark.parametrize("engine", ["continuous", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_one_card(kind: str, engine: str, billion: Path) -> None:
    from quantbatch.weights import dtypes, loading

    model = Model.model_validate({"id": str(billion), **KINDS[kind]}).resolved()
    checkpoint = open_checkpoint(model)
    model = dtypes.resolve(checkpoint, model, "cuda")
    requests = work(24, Sampling())
    found = []
    for layers in ((), (12, 10)):
        loaded = loading.load(checkpoint, model, "cuda", card_layers=layers).model
        devices = {str(p.device) for p in loaded.parameters()}
        assert len(devices) == max(1, len(layers))
        found.append(run(engine_of(loaded, engine), requests))
        del loaded
        gc.collect()
    same = equal(*found)
    print(f"{kind}, {engine}: {same} of {len(requests)} rows equal over two cards")
    assert same == len(requests) if kind == "fp32" else same >= 0.9 * len(requests)


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_each_card_takes_what_was_planned(kind: str, billion: Path) -> None:
    import torch

    from quantbatch.weights import dtypes, loading

    model = Model.model_validate({"id": str(billion), **KINDS[kind]}).resolved()
    checkpoint = open_checkpoint(model)
    model = dtypes.resolve(checkpoint, model, "cuda")
    asked = Work(max_tokens=1024, prompt_tokens=800, step_tokens=512, greedy=True, cards=2)
    plan = plan_memory(checkpoint, model, asked, 3 << 30)
    besides, layers, head = weigh_layers(checkpoint, model)
    first = plan.card_layers[0]
    planned = [besides + sum(layers[:first]), head + sum(layers[first:])]
    gc.collect()
    torch.cuda.empty_cache()
    start = [torch.cuda.memory_allocated(card) for card in range(2)]
    loaded = loading.load(checkpoint, model, "cuda", card_layers=plan.card_layers).model
    taken = [torch.cuda.memory_allocated(card) - start[card] for card in range(2)]
    print(f"{kind}: planned {[p >> 20 for p in planned]} MiB, allocated {[t >> 20 for t in taken]}")
    for mine, theirs in zip(planned, taken, strict=True):
        assert mine <= theirs
        assert theirs <= 1.005 * mine  # each tensor is rounded up to 512 bytes
    del loaded
