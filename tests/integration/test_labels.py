"""Tasks that read, from rows to columns, against a forward in float64 over the whole text of each
label: with real tokenizers, in chat and text, by both engines, and once through a whole job.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml

from quantbatch import pipeline, rows, tasks
from quantbatch.engine import Engine, alone
from quantbatch.engine.continuous import ContinuousEngine, EngineLimits
from quantbatch.prompts.renderers import renderer_of
from quantbatch.records import Answer, Request, RequestId
from quantbatch.spec import JobSpec, Sampling
from quantbatch.specfile import load_spec
from quantbatch.wants import read_ask
from tests.integration.llama import loaded, make_llama
from tests.integration.support import MODEL, proven

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.support import Head

hf: Any = transformers

TEXTS = [
    "Return True if the octet should be escaped with body quopri.",
    "a t", "so: ", "An IncrementalEncoder encodes an input in multiple steps. " * 6, "x\n", "12",
]  # fmt: skip
LABEL_SETS = {
    "words": ["email", "codecs", "http"],
    "prefixes of each other": ["e", "email", "emailing", "em"],
    "leading spaces": [" yes", " no", "  maybe"],
    "go on with the prompt's last word": ["he", "est", "xyz"],
    "numbers and others": ["1", "12", "é🙂", "\nno"],
}


@dataclass
class Case:
    """A model twice, as it is and in float64, with its tokenizer."""

    model: Any
    exact: Any
    tokenizer: Any


@pytest.fixture(scope="module", params=["quickstart", "tiny"])
def case(request: Any, tmp_path_factory: Any, tiny_tokenizer_folder: Path) -> Case:
    if request.param == "quickstart":
        tokenizer = hf.AutoTokenizer.from_pretrained(MODEL)
        return Case(loaded(MODEL), loaded(MODEL).double(), tokenizer)
    folder = make_llama(
        tmp_path_factory.mktemp("llama"), dtype=torch.float32, vocab_size=403,
        max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    tokenizer = hf.AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    return Case(loaded(folder), loaded(folder).double(), tokenizer)


def spec_of(task: dict[str, Any], **prompt: Any) -> JobSpec:
    prompt = {"template": "{{ text }}"} | prompt
    return JobSpec.model_validate(
        {
            "name": "labels", "input": {"uri": "in"}, "model": {"id": "m"}, "prompt": prompt,
            "task": task, "output": {"uri": "out"},
        }
    )  # fmt: skip


def answered(
    case: Case, spec: JobSpec, table: pa.Table, engine: Literal["continuous", "static"]
) -> pa.Table:
    """Go from rows to columns as a job does, without Ray."""
    renderer = renderer_of(spec, case.tokenizer, max_prompt_tokens=400)
    found = renderer.render(table)
    assert found.asks is not None
    requests = []
    for row, (ids, text) in enumerate(
        zip(found.token_ids.to_pylist(), found.asks.to_pylist(), strict=True)
    ):
        ask = read_ask(text)
        if row not in found.errors:
            id, prompt = RequestId(0, row), tuple(ids)
            requests.append(Request(id, prompt, Sampling(), 0, want=ask.want))
            if ask.beside:
                id, prompt = RequestId(0, row, 1), ask.beside.prompt_ids
                requests.append(Request(id, prompt, Sampling(), 0, want=ask.beside.want))
    answers = by_engine(case, requests) if engine == "continuous" else {
        request.id: alone.read(case.model, request) for request in requests
    }  # fmt: skip
    by_row: list[list[Answer]] = [[] for _ in range(table.num_rows)]
    for request in requests:
        by_row[request.id.row].append(answers[request.id])
    ids = pa.array([f"f:{row}" for row in range(table.num_rows)])
    rendered = rows.rendered(table, ids, found.token_ids, found.errors, found.asks)
    return rows.answered(rendered, by_row, spec)


def by_engine(case: Case, requests: list[Request]) -> dict[RequestId, Answer]:
    limits = EngineLimits(rows=3, kv_tokens=1600, step_tokens=48)
    engine: Engine = ContinuousEngine(case.model, case.tokenizer, limits)
    engine.add(requests)
    found: dict[RequestId, Answer] = {}
    while engine.has_work():
        found |= {answer.id: answer for answer in engine.step()}
    engine.close()  # type: ignore[attr-defined]
    return found


def text_of(case: Case, text: str, *, chat: bool) -> str:
    if not chat:
        return text
    found: str = case.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )
    return found


def whole_logprob(case: Case, ids: list[int], first: int = 1) -> float:
    """The log-likelihood of tokens, each after all before it, by one forward in float64."""
    with torch.inference_mode():
        scores = case.exact(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    assert scores.dtype == torch.float64
    logprobs = scores.log_softmax(-1)
    return float(sum(logprobs[place - 1, ids[place]] for place in range(first, len(ids))))


def ids_of(case: Case, text: str) -> list[int]:
    found: list[int] = case.tokenizer(text, add_special_tokens=False).input_ids
    return found


def reference(case: Case, text: str, labels: list[str], *, chat: bool, end: bool) -> np.ndarray:
    """The log-probability of each label among them: what all texts begin with falls out."""
    before = text_of(case, text, chat=chat)
    last = [case.tokenizer.eos_token_id] if end else []
    totals = np.array([whole_logprob(case, ids_of(case, before + each) + last) for each in labels])
    found: np.ndarray = totals - np.logaddexp.reduce(totals)
    return found


@pytest.mark.parametrize("engine", ["continuous", "static"])
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
@pytest.mark.parametrize("labels", LABEL_SETS.values(), ids=LABEL_SETS)
def test_probabilities_are_those_of_the_whole_texts(
    case: Case, labels: list[str], chat: bool, engine: Any
) -> None:
    for end in ("never", "always"):
        task = {"kind": "classify", "labels": labels, "end": end}
        spec = spec_of(task, format="chat" if chat else "text")
        found = answered(case, spec, pa.table({"text": TEXTS}), engine)
        for text, row in zip(TEXTS, found.to_pylist(), strict=True):
            if row["status"] == "error":
                assert row["error_type"] == "empty_prompt", row
                continue
            expected = reference(case, text, labels, chat=chat, end=end == "always")
            got = np.log([row["probabilities"][label] for label in labels])
            assert got == pytest.approx(expected, abs=1e-3)
            assert row["label"] == labels[int(np.argmax(expected))]
        assert found["status"].to_pylist().count("ok") >= len(TEXTS) - 2


def test_labels_that_begin_alike_are_told_apart_by_their_end(case: Case) -> None:
    labels = ["e", "em", "email"]
    for end in ("auto", "always"):
        found = answered(
            case, spec_of({"kind": "classify", "labels": labels, "end": end}),
            pa.table({"text": TEXTS[:1]}), "continuous",
        )  # fmt: skip
        expected = reference(case, TEXTS[0], labels, chat=True, end=True)
        assert np.log([*found["probabilities"][0].as_py().values()]) == pytest.approx(
            expected, abs=1e-3
        )


def test_the_prior_is_divided_by(case: Case) -> None:
    labels = ["email", "http"]
    task = {"kind": "classify", "labels": labels, "prior_correction": True}
    found = answered(case, spec_of(task), pa.table({"text": TEXTS}), "continuous")
    prior = reference(case, "", labels, chat=True, end=False)
    for text, row in zip(TEXTS, found.to_pylist(), strict=True):
        weights = reference(case, text, labels, chat=True, end=False) - prior
        expected = weights - np.logaddexp.reduce(weights)
        assert np.log([*row["probabilities"].values()]) == pytest.approx(expected, abs=1e-3)


def test_several_labels_are_each_a_yes_or_a_no(case: Case) -> None:
    labels = ["email", "http"]
    task = {"kind": "classify", "labels": labels, "multi_label": {"question": "Is it {label}? "}}
    found = answered(case, spec_of(task), pa.table({"text": TEXTS}), "continuous")
    for text, row in zip(TEXTS, found.to_pylist(), strict=True):
        for label in labels:
            both = [f"Is it {label}? yes", f"Is it {label}? no"]
            yes = np.exp(reference(case, text, both, chat=True, end=False)[0])
            assert row["probabilities"][label] == pytest.approx(yes, abs=1e-3)
            assert (label in row["label"]) == (row["probabilities"][label] >= 0.5)


@pytest.mark.parametrize("engine", ["continuous", "static"])
@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
def test_continuations_are_scored_as_in_the_whole_text(case: Case, chat: bool, engine: Any) -> None:
    more = ["he food", " yes", "é", "so it goes " * 9, "3", "email"]
    task = {"kind": "score", "continuation": "more", "per_token": True}
    spec = spec_of(task, format="chat" if chat else "text")
    found = answered(case, spec, pa.table({"text": TEXTS, "more": more}), engine)
    for text, ending, row in zip(TEXTS, more, found.to_pylist(), strict=True):
        if row["status"] == "error":
            assert row["error_type"] == "empty_prompt", row
            continue
        before = text_of(case, text, chat=chat)
        ids, alone_ids = ids_of(case, before + ending), ids_of(case, before)
        pairs = enumerate(zip(ids, alone_ids, strict=False))
        first = next((i for i, (a, b) in pairs if a != b), len(alone_ids))
        expected = whole_logprob(case, ids, first)
        assert row["logprob"] == pytest.approx(expected, abs=1e-3)
        assert row["token_ids"] == ids[first:]
        assert row["scored_tokens"] == len(ids) - first == len(row["token_logprobs"])
        assert row["perplexity"] == pytest.approx(np.exp(-expected / (len(ids) - first)), rel=1e-3)


def test_a_whole_text_is_scored_but_for_its_first_token(case: Case) -> None:
    texts = [TEXTS[0], TEXTS[3]]
    found = answered(
        case, spec_of({"kind": "score"}, format="text"), pa.table({"text": texts}), "continuous"
    )
    for text, row in zip(texts, found.to_pylist(), strict=True):
        assert row["logprob"] == pytest.approx(whole_logprob(case, ids_of(case, text)), abs=1e-3)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_vectors_are_pooled_states_of_length_1(case: Case, pooling: str, dtype: str) -> None:
    size = case.model.config.hidden_size
    task = {"kind": "embed", "pooling": pooling, "dtype": dtype, "dimensions": size}
    found = answered(case, spec_of(task), pa.table({"text": TEXTS}), "continuous")
    kind = pa.float16() if dtype == "float16" else pa.float32()
    assert found.schema.field("embedding").type == pa.list_(kind, size)
    for text, vector in zip(TEXTS, found["embedding"].to_pylist(), strict=True):
        ids = torch.tensor([ids_of(case, text_of(case, text, chat=True))])
        with torch.inference_mode():
            states = case.exact.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        pooled = states[-1] if pooling == "last" else states.mean(0)
        expected = (pooled / pooled.norm()).numpy()
        assert np.array(vector, float) == pytest.approx(expected, abs=1e-3)


@pytest.mark.timeout(240)
def test_a_whole_job_labels_and_is_proven(tmp_path: Path, ray_head: Head, case: Case) -> None:
    if case.model.config.vocab_size == 403:
        pytest.skip("once is enough")
    texts = [*TEXTS, None, TEXTS[0]]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"id": range(8), "text": texts}), tmp_path / "in" / "0.parquet")
    labels = ["email", "codecs", "http"]
    for name, task in {
        "classify": {"kind": "classify", "labels": labels, "prior_correction": True},
        "unsure": {"kind": "classify", "labels": labels, "min_margin": 1.0},
        "score": {"kind": "score"},
        "embed": {"kind": "embed"},
    }.items():
        fields = {
            "name": name,
            "input": {"uri": str(tmp_path / "in")},
            "model": {"id": str(MODEL), "bits": 32},
            "prompt": {"template": "{{ text }}"},
            "task": task,
            "cluster": {"gpus_per_replica": 0, "address": ray_head.address},
            "output": {"uri": str(tmp_path / name)},
            "limits": {"max_error_rate": 1.0},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(fields))
        (tmp_path / "log").write_text("")
        report = pipeline.run(load_spec(path))
        ok = 0 if name == "unsure" else 7
        assert (report.counts.ok, report.counts.error, report.counts.invalid) == (ok, 1, 7 - ok)
        proven(path)
        written = ds.dataset(tmp_path / name, format="parquet").to_table()
        assert written.num_rows == 8
        spec = load_spec(path)
        if name == "embed":
            assert written.schema.field("embedding").type == pa.list_(pa.float32(), 192)
        else:
            assert {f.name for f in tasks.fields(spec)} <= set(written.column_names)
        if name == "classify":
            local = answered(case, spec, pa.table({"text": texts}), "static")
            there = written["probabilities"].to_pylist()
            for one, other in zip(there, local["probabilities"].to_pylist(), strict=True):
                assert one == (other and pytest.approx(other, abs=1e-3))
