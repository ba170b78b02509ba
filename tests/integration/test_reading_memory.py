"""Reading rows keep to what was planned for them: measured by what torch allocates on a CPU."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from quantbatch.engine.continuous import ContinuousEngine, EngineLimits
from quantbatch.model import workspace
from quantbatch.records import Request, RequestId
from quantbatch.spec import Sampling
from quantbatch.wants import Embed, Rank, Score
from tests.integration.llama import SIZES, make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from quantbatch.wants import Want

hf: Any = transformers

CONFIG = SIZES | {"vocab_size": 60_000, "max_position_embeddings": 1024, "hidden_size": 64}
STEP_TOKENS, ROWS, PROMPT = 512, 4, 400
CHANCE = random.Random(0)
LABELS = tuple(
    tuple(CHANCE.randrange(3, 60_000) for _ in range(CHANCE.randint(1, 5))) for _ in range(45)
)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model("llama", tie_word_embeddings=True, **CONFIG)
    return hf.AutoModelForCausalLM.from_config(config).eval()


def answer(engine: ContinuousEngine, want: Want, rows: int) -> None:
    prompts = [tuple(CHANCE.randrange(3, 60_000) for _ in range(PROMPT)) for _ in range(rows)]
    engine.add(
        Request(RequestId(0, row), prompt, Sampling(), 0, want=want)
        for row, prompt in enumerate(prompts)
    )
    done = 0
    while engine.has_work():
        done += len(engine.step())
    assert done == rows


def peak_bytes(measured: profile, file: Path) -> int:
    """Return the most bytes that were allocated at once, beyond those that were before."""
    measured.export_chrome_trace(str(file))
    events = json.loads(file.read_text())["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    live = most = 0
    for change in sorted(changes, key=lambda event: event["ts"]):
        live += change["args"]["Bytes"]
        most = max(most, live)
    return most


@pytest.mark.filterwarnings("ignore::UserWarning")  # of the profiler
@pytest.mark.parametrize("want", [Score(1), Rank(LABELS), Embed("mean")], ids=lambda w: w.kind)
def test_rows_that_read_take_no_more_than_planned(model: Any, want: Want, tmp_path: Path) -> None:
    limits = EngineLimits(rows=ROWS, kv_tokens=ROWS * 512, step_tokens=STEP_TOKENS)
    engine = ContinuousEngine(model, make_tokenizer(), limits)
    answer(engine, want, 1)  # the cache's slots are there from then on
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        answer(engine, want, ROWS)
    engine.close()
    peak = peak_bytes(measured, tmp_path / "trace.json")
    activations = workspace.activation_bytes(CONFIG, STEP_TOKENS, 4)
    assert peak <= workspace.reading_bytes(CONFIG) + activations
    least = {"score": 60_000 * 4 * 372, "rank": 60_000 * 4 * 40, "embed": 1 << 20}[want.kind]
    assert peak >= least, "the scores of a step, at the least"
