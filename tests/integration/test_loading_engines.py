"""Which engine a spec gets: the continuous one, or the static one with a warning that says why."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch

from quantbatch.engine import calibration, loading, static
from quantbatch.engine.attention import NAME, UnsupportedModelError
from quantbatch.engine.continuous import ContinuousEngine
from quantbatch.engine.dedup import Deduplicated
from quantbatch.engine.probe import Probe
from quantbatch.engine.static import StaticEngine
from quantbatch.records import Completion, Request, RequestId
from quantbatch.spec import JobSpec, Sampling
from tests.integration.llama import make_model

if TYPE_CHECKING:
    from pathlib import Path

    from quantbatch.engine.loading import Loaded

PROMPTS = [(5, 6, 7), (8,) * 20, tuple(range(10, 50))]
WORDS = 400
"""Tokens of the tokenizer."""


def made(folder: Path, tokenizer_folder: Path, model_type: str, changes: dict[str, Any]) -> Path:
    sizes = {"vocab_size": WORDS, "initializer_range": 0.2, "eos_token_id": 2}
    make_model(folder, model_type, dtype=torch.float32, **sizes | changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_folder / name, folder)
    return folder


def load(folder: Path, **engine: Any) -> Loaded:
    spec = JobSpec.model_validate(
        {
            "name": "t", "input": {"uri": "in"}, "output": {"uri": "out"},
            "model": {"id": str(folder), "bits": 32}, "prompt": {"template": "x"},
            "sampling": {"max_new_tokens": 8},
            "engine": {"kind": "continuous", "max_input_tokens": 64} | engine,
        }
    )  # fmt: skip
    options: Any = spec.engine
    try:
        return loading.load(spec, options, device="cpu", max_tokens=72, folder="/")
    finally:
        torch.set_num_threads(1)


def answers(engine: Any, prompts: list[tuple[int, ...]] = PROMPTS) -> list[tuple[int, ...]]:
    engine.add(
        Request(RequestId(0, row), prompt, Sampling(max_new_tokens=8), 0)
        for row, prompt in enumerate(prompts)
    )
    found: dict[int, Any] = {}
    while engine.has_work():
        found |= {answer.id.row: answer for answer in engine.step()}
    assert all(isinstance(answer, Completion) for answer in found.values())
    return [found[row].token_ids for row in range(len(prompts))]


def said_static(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "static engine" in r.getMessage()]


CANNOT: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {"state_size": 8}),
    "linear attention": (
        "qwen3_next",
        {
            "num_hidden_layers": 4, "head_dim": 32, "linear_num_key_heads": 2,
            "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "latent attention": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 32,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32,
            "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2,
            "moe_intermediate_size": 64, "first_k_dense_replace": 1,
        },
    ),
    "sinks": (
        "gpt_oss",
        {
            "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "biases of positions": ("bloom", {"hidden_size": 128, "n_head": 4, "n_layer": 2}),
}  # fmt: skip


@pytest.mark.parametrize("kind", CANNOT)
def test_a_model_that_can_t_run_packed_gets_the_static_engine(
    tmp_path: Path, tiny_tokenizer_folder: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    model_type, changes = CANNOT[kind]
    folder = made(tmp_path, tiny_tokenizer_folder, model_type, changes)
    with caplog.at_level("WARNING"):
        loaded = load(folder, deduplicate=False, batch_size=2)
    assert isinstance(loaded.engine, StaticEngine)
    (said,) = said_static(caplog)
    assert "which is slower: " in said
    assert not said.endswith(": ")
    assert [len(answer) for answer in answers(loaded.engine)]
    assert loaded.engine._model.config._attn_implementation != NAME


GEMMA = {"sliding_window": 16, "head_dim": 32, "pad_token_id": 0}
"""Has no SDPA."""


@pytest.mark.parametrize(
    ("model_type", "changes", "batch_size"),
    [
        ("llama", {}, 4),
        ("llama", {}, "auto"),
        ("gemma2", GEMMA, 4),
        ("gemma2", GEMMA, "auto"),
        ("mixtral", {"num_local_experts": 4}, 4),
    ],
)
def test_a_model_that_can_gets_the_continuous_engine(
    tmp_path: Path,
    tiny_tokenizer_folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    changes: dict[str, Any],
    batch_size: int | str,
) -> None:
    monkeypatch.setattr(calibration.best_size, "__defaults__", ((2, 4),))
    folder = made(tmp_path, tiny_tokenizer_folder, model_type, changes)
    with caplog.at_level("WARNING"):
        loaded = load(folder, batch_size=batch_size)
        plain = load(folder, kind="static", batch_size=1, deduplicate=False)
    assert said_static(caplog) == []
    assert isinstance(loaded.engine, Deduplicated)
    assert isinstance(loaded.engine.engine, ContinuousEngine)
    assert isinstance(plain.engine, static.StaticEngine)
    assert answers(loaded.engine, [*PROMPTS, PROMPTS[0]]) == answers(
        plain.engine, [*PROMPTS, PROMPTS[0]]
    )
    totals = loaded.progress().totals
    assert totals["finished"] == 3
    assert totals["copied_answers"] == 1


def test_a_refusal_by_the_probe_leaves_the_model_to_the_static_engine(
    tmp_path: Path,
    tiny_tokenizer_folder: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = made(tmp_path, tiny_tokenizer_folder, "llama", {})
    expected = answers(load(folder, kind="static", batch_size=1, deduplicate=False).engine)

    def refuse(*_: object) -> None:
        raise UnsupportedModelError("its scores over packed rows differ")

    monkeypatch.setattr(Probe, "check", refuse)
    for batch_size in (2, "auto"):
        caplog.clear()
        with caplog.at_level("WARNING"):
            loaded = load(folder, deduplicate=False, batch_size=batch_size)
        assert isinstance(loaded.engine, StaticEngine)
        (said,) = said_static(caplog)
        assert "its scores over packed rows differ" in said
        assert loaded.engine._model.config._attn_implementation == "sdpa"
        assert answers(loaded.engine) == expected


def test_a_relative_cache_is_where_the_driver_runs(
    tmp_path: Path, tiny_tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica has another working directory than the driver."""
    folder = made(tmp_path / "model", tiny_tokenizer_folder, "llama", {})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    spec = JobSpec.model_validate(
        {
            "name": "t", "input": {"uri": "in"}, "output": {"uri": "out"},
            "model": {"id": "model", "bits": 4, "cache": "weights"}, "prompt": {"template": "x"},
            "sampling": {"max_new_tokens": 8},
            "engine": {"kind": "static", "batch_size": 2, "max_input_tokens": 64},
        }
    )  # fmt: skip
    options: Any = spec.engine
    for _ in range(2):
        loading.load(spec, options, device="cpu", max_tokens=72, folder=str(tmp_path)).close()
    torch.set_num_threads(1)
    assert folder.exists()
    assert len(list(tmp_path.glob("weights/*/record-*"))) == 1
    assert list((tmp_path / "elsewhere").iterdir()) == []
