"""The engine llama_cpp: the same model as in transformers, from its GGUF file as it is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp", reason="quantbatch[llama-cpp] is not installed")

import torch

from quantbatch.engine.llama_cpp import LlamaCppEngine, PackedModel, Piece
from quantbatch.engine.pieces import Row
from quantbatch.engine.static import StaticEngine
from quantbatch.errors import DoesNotFit, ModelError
from quantbatch.model.checkpoint import open_checkpoint, open_packed_gguf
from quantbatch.model.gguf import read_gguf, stored_bytes
from quantbatch.model.llama_memory import plan_llama_cpp
from quantbatch.model.memory import Work
from quantbatch.prompts.tokens import tokenizer_of
from quantbatch.records import Completion, Failure, Request, RequestId
from quantbatch.replica import ReplicaJob, load_engine
from quantbatch.spec import JobSpec, Model, Sampling
from quantbatch.spec import LlamaCppEngine as Options
from quantbatch.wants import Score
from quantbatch.weights.loading import load
from tests.integration.ggufs import write_gguf
from tests.integration.llama import OPTIONS, make_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from quantbatch.records import Answer

PROMPTS = [[3 + (7 * i + j * j) % 397 for j in range(1 + (11 * i) % 60)] for i in range(12)]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_folder: Path) -> Path:
    """A folder with a model in some types."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    make_model(folder / "model", "llama", vocab_size=403, initializer_range=0.3)
    for kind in ("F32", "Q8_0", "Q4_0"):
        write_gguf(folder / "model", folder / f"{kind}.gguf", kind, tokenizer=tiny_tokenizer_folder)
    return folder


def packed(path: Path, **changes: Any) -> PackedModel:
    options = {"rows": 4, "row_tokens": 256, "step_tokens": 64, "threads": 1} | changes
    return PackedModel(path, **options)


@pytest.fixture
def model(files: Path) -> Iterator[PackedModel]:
    made = packed(files / "F32.gguf")
    yield made
    made.close()


def tokenizer(files: Path) -> Any:
    return tokenizer_of(open_packed_gguf(Model(id=str(files / "F32.gguf"))))


def requests(prompts: Sequence[Sequence[int]], **fields: Any) -> list[Request]:
    sampling = Sampling(**{"max_new_tokens": 12, **fields})
    return [
        Request(RequestId(0, i), tuple(prompt), sampling, seed=1000 + i)
        for i, prompt in enumerate(prompts)
    ]


def run(engine: Any, asked: Sequence[Request]) -> list[Answer]:
    engine.add(asked)
    answers: dict[RequestId, Answer] = {}
    while engine.has_work():
        answers |= {answer.id: answer for answer in engine.step()}
    return [answers[request.id] for request in asked]


def tokens(answers: Sequence[Answer]) -> list[tuple[int, ...]]:
    assert all(isinstance(answer, Completion) for answer in answers), answers
    return [answer.token_ids for answer in answers if isinstance(answer, Completion)]


@pytest.fixture(scope="session")
def twin(files: Path) -> StaticEngine:
    """The same file in transformers, in float32."""
    section = Model(id=str(files / "F32.gguf"), dtype="float32")
    checkpoint = open_checkpoint(section)
    found = load(checkpoint, section, "cpu").model
    return StaticEngine(found, tokenizer_of(checkpoint), batch_size=1)


def test_scores_are_those_of_transformers(files: Path, model: PackedModel) -> None:
    section = Model(id=str(files / "F32.gguf"), dtype="float32")
    exact: Any = load(open_checkpoint(section), section, "cpu").model
    for slot, prompt in enumerate(PROMPTS[:4]):
        row = Row(requests([prompt])[0], (0, 0, 0), list(prompt), 256, len(prompt), slot=slot)
        scores = model.scores([Piece(row, prompt, samples=True)])
        with torch.inference_mode():
            wanted = exact(torch.tensor([prompt])).logits[0, -1]
        assert (scores[0] - wanted).norm() / wanted.norm() < 5e-3  # its cache has 16 bits


@pytest.mark.parametrize("name", ["greedy", *OPTIONS])
def test_answers_are_those_of_the_static_engine(
    files: Path, model: PackedModel, twin: StaticEngine, name: str
) -> None:
    options = dict(OPTIONS.get(name, {}))
    if name == "minimum before the end":
        options["logit_bias"] = {tokenizer(files).eos_token_id: 20.0}
    engine = LlamaCppEngine(model, tokenizer(files))
    found = tokens(run(engine, requests(PROMPTS, **options)))
    wanted = tokens(run(twin, requests(PROMPTS, **options)))
    same = sum(a == b for a, b in zip(found, wanted, strict=True))
    assert same >= len(PROMPTS) - 2, (found, wanted)  # ties that a 16-bit cache decides


def test_a_row_s_answer_does_not_depend_on_its_company(files: Path, model: PackedModel) -> None:
    asked = requests(PROMPTS, temperature=0.9)
    together = tokens(run(LlamaCppEngine(model, tokenizer(files)), asked))
    for request, answer in zip(asked, together, strict=True):
        assert tokens(run(LlamaCppEngine(model, tokenizer(files)), [request])) == [answer]


def test_long_prompts_come_in_pieces(files: Path) -> None:
    long = [[3 + (5 * j) % 390 for j in range(length)] for length in (200, 3, 90, 150)]
    answers = []
    for step_tokens in (16, 256):
        model = packed(files / "F32.gguf", step_tokens=step_tokens)
        answers.append(tokens(run(LlamaCppEngine(model, tokenizer(files)), requests(long))))
        model.close()
    assert answers[0] == answers[1]


def test_stop_strings_end_tokens_and_logprobs(files: Path, model: PackedModel) -> None:
    engine = LlamaCppEngine(model, tokenizer(files))
    plain = run(engine, requests(PROMPTS[:3], max_new_tokens=20, logprobs=3))
    for answer in plain:
        assert isinstance(answer, Completion)
        assert answer.logprobs is not None
        assert len(answer.logprobs) == len(answer.token_ids)
        for token, each in zip(answer.token_ids, answer.logprobs, strict=True):
            assert each.top[0][0] == token
            assert each.top[0][1] == pytest.approx(each.logprob)
            assert len(each.top) == 3
    first = plain[0]
    assert isinstance(first, Completion)
    assert len(first.text) > 6
    stop = first.text[3:5]
    cut = run(engine, requests(PROMPTS[:1], max_new_tokens=20, stop=[stop]))[0]
    assert isinstance(cut, Completion)
    assert cut.text == first.text[: first.text.index(stop)]
    assert cut.finish_reason.value == "stop"
    end = first.token_ids[4]
    cut = run(engine, requests(PROMPTS[:1], max_new_tokens=20, stop_token_ids=[end]))[0]
    assert isinstance(cut, Completion)
    assert cut.token_ids == first.token_ids[: first.token_ids.index(end) + 1]


def test_the_file_s_own_end_token_ends_an_answer(files: Path, model: PackedModel) -> None:
    end = tokenizer(files).eos_token_id
    assert end in model.end_ids
    asked = requests(PROMPTS[:2], logit_bias={end: 100.0})
    for answer in run(LlamaCppEngine(model, tokenizer(files)), asked):
        assert isinstance(answer, Completion)
        assert (answer.token_ids, answer.text) == ((end,), "")


def test_what_llama_cpp_knows_as_an_end_ends_an_answer_too(model: PackedModel) -> None:
    """It knows more of them than the file names, by their texts."""
    assert model.end_ids == [0, 2]  # <|endoftext|>, <|im_end|>


def test_what_the_model_can_not_take_fails_alone(files: Path, model: PackedModel) -> None:
    engine = LlamaCppEngine(model, tokenizer(files))
    answers = run(engine, requests([[3] * 256, [403], [5]]))
    assert [type(answer) for answer in answers] == [Failure, Failure, Completion]
    scored = dataclasses.replace(requests([[5, 6]])[0], want=Score(first=1))
    failure = run(engine, [scored])[0]
    assert isinstance(failure, Failure)
    assert "kind: continuous" in failure.message


def test_a_step_that_fails_gives_its_rows_back(
    files: Path, model: PackedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests(PROMPTS)
    wanted = tokens(run(LlamaCppEngine(model, tokenizer(files)), asked))
    engine = LlamaCppEngine(model, tokenizer(files))
    engine.add(asked)
    answers = {answer.id: answer for _ in range(3) for answer in engine.step()}
    with monkeypatch.context() as patch:
        patch.setattr(model, "scores", lambda _: (_ for _ in ()).throw(RuntimeError("code -3")))
        with pytest.raises(RuntimeError, match="code -3"):
            engine.step()
    given_back = engine.evict()
    assert 0 < len(given_back) <= 4
    engine.add(given_back)
    while engine.has_work():
        answers |= {answer.id: answer for answer in engine.step()}
    assert tokens([answers[request.id] for request in asked]) == wanted


def test_the_plan_counts_the_file_s_tensors(files: Path) -> None:
    for kind in ("F32", "Q8_0", "Q4_0"):
        path = files / f"{kind}.gguf"
        model = packed(path)
        checkpoint = open_packed_gguf(Model(id=str(path)))
        plan = plan_llama_cpp(checkpoint, Options(), Work(250, 200, batch_size=4), None)
        assert plan.weight_bytes == model.weight_bytes == stored_bytes(read_gguf(path).tensors)
        assert plan.kv_tokens == 4 * 256
        assert plan.kv_bytes == 4 * 256 * 2 * 2 * 2 * 32 * 2
        assert 0.9 < plan.weight_bytes / path.stat().st_size < 1
        model.close()


def test_fewer_rows_are_planned_where_more_do_not_fit(files: Path) -> None:
    checkpoint = open_packed_gguf(Model(id=str(files / "Q8_0.gguf")))
    work = Work(100_000, 90_000)
    rich = plan_llama_cpp(checkpoint, Options(), work, 80 * 2**30)
    half = rich.overhead_bytes + (rich.total - rich.overhead_bytes) // 2
    assert rich.batch_size == 16
    assert 1 <= plan_llama_cpp(checkpoint, Options(), work, half).batch_size < 16
    with pytest.raises(DoesNotFit, match="a file with fewer bits"):
        plan_llama_cpp(checkpoint, Options(), work, 2**29)


def test_what_is_no_gguf_file_or_asks_for_bits_is_refused(files: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="runs GGUF files"):
        open_packed_gguf(Model(id=str(files / "model")))
    with pytest.raises(ModelError, match="in the bits that it has"):
        open_packed_gguf(Model(id=str(files / "Q8_0.gguf"), bits=4))
    (tmp_path / "x.gguf").write_bytes(
        (files / "Q8_0.gguf").read_bytes().replace(b"llama", b"lxama")
    )
    with pytest.raises(ModelError, match=r"can't be loaded by llama\.cpp"):
        packed(tmp_path / "x.gguf")


def test_a_replica_answers_with_it(files: Path, tmp_path: Path) -> None:
    spec = JobSpec.model_validate(
        {
            "name": "packed",
            "input": {"uri": str(tmp_path / "in")},
            "model": {"id": str(files / "Q8_0.gguf")},
            "prompt": {"template": "{{ text }}", "format": "text"},
            "sampling": {"max_new_tokens": 5},
            "engine": {"kind": "llama_cpp", "batch_size": 3},
            "cluster": {"gpus_per_replica": 0},
            "output": {"uri": str(tmp_path / "out")},
        }
    )
    loaded = load_engine(ReplicaJob(spec, "cpu", 100, str(tmp_path)))
    asked = requests([*PROMPTS, PROMPTS[1]])
    found = tokens(run(loaded.engine, asked))
    assert found[-1] == found[1]
    assert loaded.planned_bytes > 0.9 * (files / "Q8_0.gguf").stat().st_size
    with pytest.raises(ModelError, match="built without CUDA"):
        load_engine(ReplicaJob(spec, "cuda", 100, str(tmp_path)))
