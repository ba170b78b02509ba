"""The benchmark of a card, rehearsed on a CPU with tiny shapes, so that it does not rot."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from jobs.gpubench import engines, fused, labels, oom, shapes, speed
from jobs.gpubench.paged import PagedOnCard
from jobs.gpubench.record import Record
from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.model.footprint import weigh
from quantbatch.spec import Model
from quantbatch.weights import loading

if TYPE_CHECKING:
    from pathlib import Path

    from quantbatch.engine.continuous import ContinuousEngine


@pytest.mark.parametrize(("shape", "count"), [("8b", 8_030_261_248), ("32b", 32_763_876_352)])
def test_shapes_have_the_parameters_of_the_models(shape: str, count: int) -> None:
    assert sum(each.numel for each in shapes.describe(shape).tensors) == count


@pytest.fixture(scope="module", params=["tiny", "tiny-qwen"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A shape, and its weights in several files."""
    folder = tmp_path_factory.mktemp(request.param)
    shapes.write(folder, request.param, "cpu", shard_bytes=200_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return request.param, folder


@pytest.mark.parametrize("kind", shapes.KINDS)
def test_a_model_made_in_place_is_the_one_loaded_from_files(written: Any, kind: str) -> None:
    shape, folder = written
    spec = Model.model_validate({"id": str(folder), **shapes.KINDS[kind]})
    found = loading.load(open_checkpoint(spec), spec, "cpu")
    built = shapes.build(shape, kind, "cpu")
    ids = torch.arange(600).view(2, 300)  # longer than the original context of its rotary embedding
    with torch.inference_mode():
        assert torch.equal(built.model(ids).logits, found.model(ids).logits)
    planned = weigh(built.checkpoint, built.spec).total_bytes
    assert built.weight_bytes == found.weight_bytes == planned


def test_matrices_and_decode_steps_are_timed(tmp_path: Path) -> None:
    record = Record("fused", "cpu", {"shape": "tiny"}, tmp_path)
    fused.measure(record, ["tiny"], "nf4-dq", [2], steps=2)
    decoded = [each for each in record.results if "step_ms" in each]
    assert [each["ours"] for each in decoded] == [False, True]
    products = [each for each in record.results if "bitsandbytes_us" in each]
    sizes = {(each["n"], each["k"]) for each in products}
    assert sizes == {(64, 64), (32, 64), (128, 64), (64, 128)}
    assert len(products) == len(sizes) * len(fused.ROWS)
    assert all(each["bf16_us"] > 0 and each["floor_us"] > 0 for each in products)


def test_all_contenders_answer(tmp_path: Path) -> None:
    record = Record("speed", "cpu", {"shape": "tiny"}, tmp_path)
    speed.race(record, "tiny", "bf16", rows=4, contender_budget_s=60)
    named = {each["contender"]: each for each in record.results if "contender" in each}
    assert len(named) == 8
    assert not [each for each in named.values() if "failed" in each]
    assert all(each["rows_finished"] == 4 for each in named.values())
    document = json.loads((tmp_path / "speed-tiny.json").read_text())
    assert document["results"] == record.results


def test_a_contender_without_time_is_measured_over_the_rows_it_finished(tmp_path: Path) -> None:
    record = Record("speed", "cpu", {}, tmp_path)
    speed.race(record, "tiny", "bf16", rows=40, contender_budget_s=0.0, only="pipeline")
    *_, pipeline = record.results
    assert pipeline["contender"] == "pipeline, batch 8"
    assert pipeline["rows_finished"] == 32


def test_a_contender_that_fails_is_told_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(contender: PagedOnCard) -> Any:
        if contender.flash and contender.graphs is None:
            raise RuntimeError("this step can't be recorded")
        return plain(contender)

    plain = PagedOnCard._config
    monkeypatch.setattr(PagedOnCard, "_config", config)
    record = Record("speed", "cpu", {}, tmp_path)
    speed.race(record, "tiny", "bf16", rows=2, contender_budget_s=60, only="flash-style, 128")
    *_, failed, instead = record.results
    assert failed["failed"] == "RuntimeError: this step can't be recorded"
    assert instead["contender"] == failed["contender"] + ", unrecorded"
    assert instead["rows_finished"] == 2


def test_reading_is_measured_against_writing_and_padded_loops(tmp_path: Path) -> None:
    record = Record("label", "cpu", {}, tmp_path)
    labels.measure(record, "tiny", "fp32", rows=4, only="short|score|embed")
    assert not [each for each in record.results if "failed" in each]
    found = [(each["case"], each["contender"]) for each in record.results if "contender" in each]
    assert found == [
        *(("short", "generate 5"), ("short", "classify"), ("short", "pipeline, batch 8")),
        *(("score", "score"), ("score", "padded, batch 32")),
        *(("embed", "embed"), ("embed", "padded, batch 32")),
    ]
    assert all(each["furthest_off"] < 1e-3 for each in record.results if "furthest_off" in each)


def test_forms_are_measured_with_a_vocabulary_of_the_model_s_size(tmp_path: Path) -> None:
    record = Record("label", "cpu", {}, tmp_path)
    labels.measure(record, "tiny", "nf4-dq", rows=4, only="structured")
    *_, found = record.results
    assert found["words"] == shapes.SHAPES["tiny"].fields["vocab_size"]
    assert found["valid"] == found["complete"] == found["rows"] == 2


def test_forms_are_left_out_where_their_library_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels, "LIBRARIES", ("llguidance", "no_such_library"))
    record = Record("label", "cpu", {}, tmp_path)
    labels.measure(record, "tiny", "fp32", rows=4, only="structured")
    *_, found = record.results
    assert found["skipped"] == "no_such_library can't be imported"


def test_memory_runs_out_until_it_did_so_often_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short_of_memory(engine: ContinuousEngine, _: str) -> Any:
        def forward(pieces: Any, tokens_T: Any) -> Any:  # noqa: N803
            if len(tokens_T) > 128:
                raise torch.OutOfMemoryError
            return plain(pieces, tokens_T)

        plain = engine._forward
        monkeypatch.setattr(engine, "_forward", forward)
        try:
            return engines.taken(engine.step())
        finally:
            engine._forward = plain

    monkeypatch.setattr(oom, "on_card", lambda _: True)
    monkeypatch.setattr(oom, "_short_of_memory", short_of_memory)
    record = Record("oom", "cpu", {}, tmp_path)
    oom.provoke(record, "tiny", "fp32", times=4, rows=8)
    *rounds, found = [each for each in record.results if "note" not in each]
    assert len(rounds) == found["rounds"] > 1
    assert found["out_of_memory"] >= 4
    assert found["equal_rows"] == found["answered"] == 8 * len(rounds)
    assert not found["lost_rows"]
