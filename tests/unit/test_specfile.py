"""What a mistake in a spec is answered with: its line, its value, and a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantbatch.errors import SpecError
from quantbatch.plainyaml import MAX_BYTES
from quantbatch.spec import JobSpec, Model, ReplicaRange, json_schema
from quantbatch.specfile import load_spec
from quantbatch.storage import redact

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantbatch.errors import JobError

BASE = """\
name: test
input:
  uri: in
model:
  id: m
  bits: 4
prompt:
  template: "{{ text }}"
output:
  uri: out
"""


def load(tmp_path: Path, text: str | bytes, *overrides: str) -> JobSpec:
    path = tmp_path / "job.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_spec(path, overrides)


def problems(tmp_path: Path, text: str | bytes, *overrides: str) -> list[tuple[str, str]]:
    """Return what is wrong with a spec: problems, without the folder's name, and hints."""
    with pytest.raises(SpecError) as caught:
        load(tmp_path, text, *overrides)
    return [(p.problem.replace(f"{tmp_path}/", ""), p.hint) for p in caught.value.problems]


def problem(tmp_path: Path, text: str | bytes, *overrides: str) -> tuple[str, str]:
    (found,) = problems(tmp_path, text, *overrides)
    return found


def test_a_spec_is_loaded(tmp_path: Path) -> None:
    spec = load(tmp_path, BASE)
    assert (spec.name, spec.input.uri, spec.model.bits) == ("test", "in", 4)
    assert spec == JobSpec.model_validate(spec.model_dump(mode="json"))


@pytest.mark.parametrize(
    ("old", "new", "said", "hint"),
    [
        ("bits: 4", "bit: 4", "6: there is no field model.bit", "did you mean model.bits?"),
        (
            "bits: 4",
            "bits: 5",
            "6: model.bits: 5: should be 4, 8, 16, 32 or 'auto'",
            "Short form: 4 is nf4",
        ),
        (
            "bits: 4",
            "nonsense: 4",
            "6: there is no field model.nonsense",
            "the fields of model are",
        ),
        (
            "bits: 4",
            "temperature: 0",
            "6: there is no field model.temperature",
            "did you mean sampling.temperature?",
        ),
        (
            "bits: 4",
            "quantization: nf4",
            '6: model.quantization: "nf4": should be a mapping',
            "Long",
        ),
        (
            "bits: 4",
            "quantization: {kind: nf5}",
            '6: model.quantization.kind: "nf5": should be none, int8, nf4 or fp4',
            "did you mean nf4?",
        ),
        (
            "bits: 4",
            "quantization: {double_quant: true}",
            "6: model.quantization.kind is missing",
            "it is none, int8, nf4 or fp4",
        ),
        (
            "bits: 4",
            "quantization: {kind: int8, double_quant: true}",
            "6: there is no field model.quantization.double_quant",
            "another kind of",
        ),
        (
            "bits: 4",
            "bits: 4\n  quantization: {kind: int8}",
            "4: model: give either bits or quantization, not both",
            "",
        ),
        ("  uri: in", "", "2: input: null: should be a mapping", "Where the rows come from"),
        (
            "  uri: in",
            "  url: in\n  uri: in",
            "3: there is no field input.url",
            "did you mean input.uri?",
        ),
        ("uri: in", "uri: []", "3: input.uri: []: should have at least 1 item", "A file, a glob"),
        ("uri: in", "uri: [a, 3]", "3: input.uri.1: 3: should be a valid string", "put quotes"),
        (
            "uri: in",
            "uri: {a: 1}",
            '3: input.uri: {"a": 1}: should be a valid string or a valid list',
            "A file, a glob",
        ),
        (
            "name: test",
            "name: no",
            "1: name: false: should be a valid string",
            "YAML reads this as false: put quotes around it",
        ),
        ("name: test", 'name: "a b"', '1: name: "a b": should match pattern', "Name of the job"),
        (
            'template: "{{ text }}"',
            "template: {{ text }}",
            "8: not YAML: found unhashable key",
            "a template needs quotes",
        ),
        (
            'template: "{{ text }}"',
            "template: a\n  column: b",
            "7: prompt: give exactly one of template, messages and column, not template and column",
            "",
        ),
        (
            'template: "{{ text }}"',
            "messages: [{role: user}]",
            "8: prompt.messages.0.content is missing",
            "A Jinja template",
        ),
    ],
)
def test_a_mistake_is_named_with_its_line_and_a_remedy(
    tmp_path: Path, old: str, new: str, said: str, hint: str
) -> None:
    assert old in BASE
    found = problem(tmp_path, BASE.replace(old, new, 1))
    assert found[0].startswith(f"job.yaml:{said}")
    assert found[1].startswith(hint) if hint != "put quotes" else "put quotes" in found[1]


@pytest.mark.parametrize(
    ("section", "said", "hint"),
    [
        (
            "sampling: {max_new_tokens: 0}",
            "sampling.max_new_tokens: 0: should be greater than or equal to 1",
            "Longest answer",
        ),
        (
            "sampling: {temperature: .nan}",
            "sampling.temperature: NaN: should be a finite number",
            "0",
        ),
        (
            "sampling: {top_p: 1e-3}",
            'sampling.top_p: "1e-3": should be a valid number',
            "YAML reads this as text: write 0.001 without quotes",
        ),
        (
            "sampling: {n: 2}",
            "sampling: n is above 1, but at temperature 0 all answers are the same",
            "",
        ),
        (
            "sampling: {n: 257, temperature: 1.0}",
            "sampling.n: 257: should be less than or equal to 256",
            "Answers to each row",
        ),
        (
            "sampling: {min_p: 1.5}",
            "sampling.min_p: 1.5: should be less than or equal to 1",
            "Sample only",
        ),
        (
            "sampling: {presence_penalty: -2.5}",
            "sampling.presence_penalty: -2.5: should be greater than or equal to -2",
            "Taken off",
        ),
        (
            "sampling: {frequency_penalty: 3}",
            "sampling.frequency_penalty: 3: should be less than or equal to 2",
            "Taken off",
        ),
        (
            "sampling: {logit_bias: {5: 101}}",
            "sampling.logit_bias.5: 101: should be less than or equal to 100",
            "",
        ),
        (
            "sampling: {bad_words: ['']}",
            'sampling.bad_words.0: "": should have at least 1 character',
            "",
        ),
        (
            "sampling: {stop_token_ids: [-1]}",
            "sampling.stop_token_ids.0: -1: should be greater than or equal to 0",
            "",
        ),
        (
            "sampling: {logprobs: 21}",
            "sampling.logprobs: 21: should be less than or equal to 20",
            "Give the log-probability",
        ),
        (
            "engine: {kind: static, batch_size: -1}",
            "engine.batch_size: -1: should be 'auto' or greater than or equal to 1",
            "Rows that run",
        ),
        (
            "engine: {kind: static, batch_size: many}",
            "engine.batch_size: \"many\": should be 'auto' or a valid integer",
            "Rows that run",
        ),
        (
            "engine: {kind: stattic}",
            'engine.kind: "stattic": should be continuous, static, llama_cpp or echo',
            "did you mean static?",
        ),
        ("cluster: {replicas: {min: 3, max: 2}}", "cluster.replicas: min 3 is above max 2", ""),
        (
            "cluster: {replicas: 0}",
            "cluster.replicas: 0: should be greater than or equal to 1",
            "Copies of the model",
        ),
        (
            "cluster: {replicas: two}",
            'cluster.replicas: "two": should be a valid integer or a mapping',
            "Copies of the model",
        ),
        (
            "max_new_tokens: 3",
            "there is no field max_new_tokens",
            "did you mean sampling.max_new_tokens?",
        ),
        (
            "cluster: {replicas: {min: 1, max: 1.5}}",
            "cluster.replicas.max: 1.5: should be a valid integer",
            "",
        ),
    ],
)
def test_a_mistake_in_a_further_section(tmp_path: Path, section: str, said: str, hint: str) -> None:
    found = problem(tmp_path, BASE + section + "\n")
    assert found[0] == f"job.yaml:11: {said}"
    assert found[1].startswith(hint)


def test_every_mistake_is_told_at_once_in_the_order_of_lines(tmp_path: Path) -> None:
    found = problems(tmp_path, "model: {id: m, bits: 3}\nname: a b\noutptu: {uri: x}\n")
    assert [said.split(":")[1] for said, _ in found] == ["1", "1", "1", "1", "2", "3"]
    assert {said.split(": ")[1] for said, _ in found} >= {"output is missing", "prompt is missing"}
    assert found[-1] == ("job.yaml:3: there is no field outptu", "did you mean output?")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a spec is a mapping of fields to values"),
        ("- a", "a spec is a mapping of fields to values"),
        ("a: [1", "1: not YAML: expected ',' or ']'"),
        ("name: x\n\tb: 1", "2: not YAML: found character '\\t'"),
        ("name: !!python/object:os.system x", "1: not YAML: could not determine a constructor"),
        ("x: y: z", "1: not YAML: mapping values are not allowed here"),
        (BASE + "---\na: 1\n", "11: not YAML: but found another document"),
        (BASE + "name: x\n", "11: 'name' is given twice"),
        (BASE + "  uri: x\n", "11: 'uri' is given twice"),
        (b"a: \xff", "not UTF-8 at byte 3"),
        ("x" * (MAX_BYTES + 1), "1,000,001 bytes; a spec has at most 1,000,000"),
        ("[" * 2000, "1: not YAML: nested too deeply"),
        ("{a: " * 2000, "1: not YAML: nested too deeply"),
        ("a: &a {b: *a}", "more than 10,000 values"),
        ("a: [" + "x, " * 10_000 + "]", "1: not YAML: more than 10,000 values"),
        ("a:\n b: !!binary aGFsbG8=", "not text, numbers, lists and mappings: a bytes"),
        ("a: !!set {x}", "not text, numbers, lists and mappings: a set"),
        ("{2026-01-01: x}", "not text, numbers, lists and mappings: keys must be str"),
        ("a:\n b: 2026-13-45", '2: not YAML: "2026-13-45" is no timestamp'),
        ("a: !!bool maybe", '1: not YAML: "maybe" is no bool'),
        ("a\n\x07", "2: not YAML: the character #x0007"),
        (BASE.replace("uri: in", 'uri: "a\\0b"'), '3: input.uri: "a\\u0000b": holds a NUL'),
        (BASE.replace("uri: in", 'uri: ["a\\ud800"]'), '3: input.uri.0: "a\\ud800": holds a NUL'),
    ],
)
def test_what_is_no_spec_at_all(tmp_path: Path, text: str | bytes, said: str) -> None:
    found = problem(tmp_path, text)
    assert found[0].removeprefix("job.yaml:").strip().startswith(said)


def test_aliases_cannot_grow_without_bound(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    assert "10,000 values" in problem(tmp_path, "\n".join(lines))[0]


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(BASE)
    with pytest.raises(SpecError, match=r"did you mean .*job\.yaml\?"):
        load_spec(tmp_path / "jobs.yaml")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.bits", "not of the form a.b=value"),
        ("=3", "not of the form a.b=value"),
        ("model..bits=3", "not of the form a.b=value"),
        ("model.bits=five", "model.bits: \"five\": should be 4, 8, 16, 32 or 'auto'"),
        ("modle.bits=4", "there is no field modle"),
        ("name.x=4", "name is a value and has no fields"),
        ("output.keep=[a, 3]", "output.keep.1: 3: should be a valid string"),
        ("name=!!python/name:os.system", "could not determine a constructor for the tag"),
        ("name=[&a [x, x], *a, *b]", "name: "),
        (f"name={'[' * 60}{']' * 60}", "nested too deeply"),
        ("task={kind: classify, kind: score}", "1: 'kind' is given twice"),
        ("input.uri=s3://AK:se/cret@bucket/x", "input.uri: a URI (s3://...) with a user"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, said: str) -> None:
    found = problem(tmp_path, BASE, override)[0]
    assert found.startswith(f"--set {redact(override)}:")
    assert said in found


def test_an_override_cannot_grow_by_aliases(tmp_path: Path) -> None:
    inner = ["&a0 [x, x, x, x, x, x, x, x, x, x]"]
    inner += [f"&a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    said = problem(tmp_path, BASE, f"input.uri=[{', '.join(inner)}]")[0]
    assert "more than 10,000 values" in said
    assert len(said) < 400


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY@bucket/in",
        "s3://user@bucket/in",
        "https://user:hunter2@host/in",
        "https://bucket.s3.amazonaws.com/in?X-Amz-Signature=hunter2&X-Amz-Date=1",
        "s3://bucket/in?AWSAccessKeyId=hunter2",
    ],
)
@pytest.mark.parametrize(
    "place",
    ["input.uri", "output.uri", "model.id", "model.cache", "answers_cache.uri", "cluster.address",
     "input.storage.endpoint_url", "output.storage.endpoint_url"],
)  # fmt: skip
def test_credentials_in_a_uri_are_refused_and_not_repeated(
    tmp_path: Path, place: str, uri: str
) -> None:
    found = problem(tmp_path, BASE, f"{place}={uri}")
    assert "environment" in found[0] or "should match pattern" in found[0]
    assert not any(secret in str(found) for secret in ("hunter2", "K7MDENG", "AKIA", "user@"))


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/a?[b-c].parquet",
        "s3://bucket/a:b@c.parquet",
        "s3://arn:aws:s3:eu-west-1:123456789012:accesspoint/name/in",
        "in/a@b:c?token.parquet",
        "file:///in",
    ],
)
def test_other_uris_are_taken(tmp_path: Path, uri: str) -> None:
    assert load(tmp_path, BASE, f"input.uri={json.dumps(uri)}").input.uri == uri


def test_overrides_are_yaml_and_the_last_one_counts(tmp_path: Path) -> None:
    overrides = (
        "model.bits=8", "model.bits=16", "cluster.replicas={min: 1, max: 3}",
        "input.uri=[a, b]", "prompt.template={{ text }}!", "limits.max_error_rate=0.5",
    )  # fmt: skip
    spec = load(tmp_path, BASE, *overrides)
    assert spec.model.bits == 16
    assert spec.cluster.replicas == ReplicaRange(min=1, max=3)
    assert spec.input.uri == ["a", "b"]
    assert spec.prompt.template == "{{ text }}!"
    assert spec.limits.max_error_rate == 0.5


def test_the_file_is_not_changed_by_overrides(tmp_path: Path) -> None:
    load(tmp_path, BASE, "model.bits=8")
    assert load(tmp_path, BASE).model.bits == 4


WORDS = st.sampled_from(
    ["name", "input", "uri", "model", "bits", "kind", "a", "-", ":", "{", "[", "*"]
)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=80) | st.lists(WORDS | st.just("\n  "), max_size=20).map(" ".join))
def test_any_text_is_a_spec_or_a_spec_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(SpecError):
        load_spec(path)


def test_token_ids_as_keys_survive_json(tmp_path: Path) -> None:
    """The record of a job is JSON, whose keys are texts."""
    spec = load(
        tmp_path, BASE + "sampling: {logit_bias: {5: -100, 7: 1.5}}\n", "sampling.logit_bias.9=2.0"
    )
    assert spec.sampling.logit_bias == {5: -100, 7: 1.5, 9: 2.0}
    assert JobSpec.model_validate(json.loads(json.dumps(spec.model_dump(mode="json")))) == spec
    with pytest.raises(SpecError):
        load(tmp_path, BASE + "sampling: {logit_bias: {five: 1}}\n")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(
    place=st.sampled_from(
        ["name", "input", "input.uri", "model", "model.quantization", "prompt.messages", "engine",
         "sampling.stop", "cluster.replicas", "output.keep", "task", "limits.attempts"]
    ),
    value=VALUES,
)  # fmt: skip
def test_any_value_is_accepted_or_named_with_its_place(
    tmp_path_factory: pytest.TempPathFactory, place: str, value: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_text(BASE)
    found: Sequence[JobError] = []
    try:
        load_spec(path, [f"{place}={json.dumps(value)}"])
    except SpecError as error:
        found = [*error.problems] or [error]
    assert all(problem.problem.startswith("--set") for problem in found)


def test_the_kept_schema_is_fresh() -> None:
    kept = Path(__file__).parents[2] / "configs" / "quantbatch.schema.json"
    assert json.loads(kept.read_text()) == json_schema(), "run `make docs`"


def test_relative_paths_of_a_model_are_found_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    model = Model(id="model", cache="cache")
    assert model.seen_from(str(tmp_path)) == Model(
        id=str(tmp_path / "model"), cache=str(tmp_path / "cache")
    )
    for cache in ("s3://bucket/weights", "/weights", "~/weights", None):
        elsewhere = Model(id="org/name", cache=cache)
        assert elsewhere.seen_from(str(tmp_path)) == elsewhere


def test_a_message_repeats_no_more_than_the_beginning_of_what_is_long(tmp_path: Path) -> None:
    for line in ("engine: {kind: LONG}", "LONG: 1", "name: [LONG]", "sampling: {stop: LONG: x}"):
        found = problems(tmp_path, line.replace("LONG", "x" * 70_000))
        assert all(len(said) < 2000 for said, _ in found), line
