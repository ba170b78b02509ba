import json
import pickle
import random
import re
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from quantbatch.errors import ModelError, SpecError
from quantbatch.prompts import tokens
from quantbatch.prompts.rendering import Renderer, check_prompt, row_seed
from quantbatch.prompts.tokens import load_tokenizer
from quantbatch.spec import Message, Prompt

Tokenizer = PreTrainedTokenizerBase
USER = Prompt(template="{{ text }}")
TEXT = Prompt(template="{{ text }}", format="text")
CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<unused>"]
WORDS = ["the food", " was nice", "\n", " ", "count", "ö", "👋🏽", "שלום", "\x00", "<", "|>"]
HALVES = ["<|im_", "end|>"]

texts = st.lists(st.sampled_from(WORDS) | st.text(max_size=8), min_size=1).map("".join)
hostile = st.lists(st.sampled_from(WORDS + HALVES + CONTROL) | st.text(max_size=3), min_size=1).map(
    "".join
)
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tiny_tokenizer_folder)


@pytest.fixture(scope="module")
def bos_tokenizer(
    tiny_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    """Puts <|endoftext|> before each text, and was saved with the truncation of its training."""
    folder = tmp_path_factory.mktemp("bos")
    found = json.loads((tiny_tokenizer_folder / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    found["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    found["truncation"] = {
        "direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(found))
    for name in ("tokenizer_config.json", "config.json"):
        (folder / name).write_text((tiny_tokenizer_folder / name).read_text())
    return load_tokenizer(folder)


def renderer(
    prompt: Prompt,
    tokenizer: Tokenizer,
    limit: int = 1_000_000,
    too_long: tokens.TooLong = "error",
) -> Renderer:
    return Renderer(prompt, tokenizer, max_prompt_tokens=limit, too_long=too_long)


def render_one(made: Renderer, **row: object) -> list[int]:
    prompts = made.render(pa.table({name: [value] for name, value in row.items()}))
    assert not prompts.errors, prompts.errors
    ids: list[int] = prompts.token_ids[0].as_py()
    return ids


def error_of(made: Renderer, **row: object) -> tuple[str, str]:
    prompts = made.render(pa.table({name: [value] for name, value in row.items()}))
    assert prompts.token_ids.to_pylist() == [None]
    (error,) = prompts.errors.values()
    return error.kind, error.message


def chat_ids(tokenizer: Tokenizer, messages: list[dict[str, str]], **more: Any) -> list[int]:
    """What transformers itself makes of a chat."""
    ids: Any = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=True,
        return_dict=False,
        sanitize_control_tokens=True,
        **more,
    )
    return list(ids)


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


# What is rendered


@quick
@given(texts)
def test_a_chat_is_that_of_transformers(tokenizer: Tokenizer, text: str) -> None:
    made = renderer(USER, tokenizer)
    if text.strip():
        wanted = chat_ids(tokenizer, [{"role": "user", "content": text}])
        assert render_one(made, text=text) == wanted
        assert (
            decode(tokenizer, wanted)
            == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        )


@quick
@given(texts)
def test_a_text_is_that_of_the_tokenizer(bos_tokenizer: Tokenizer, text: str) -> None:
    if text.strip():
        ids = render_one(renderer(TEXT, bos_tokenizer), text=text)
        assert ids == bos_tokenizer.encode(text)
        assert ids[0] == 0
        assert decode(bos_tokenizer, ids[1:]) == text


@pytest.mark.parametrize(
    "text",
    ["\x00", "a\x1b[31m\r\n", "👩‍👩‍👧‍👦 🇩🇪", "مرحبا \u202eabc", "e\u0301", "\ufeffa", "\U0010ffff"],
)
def test_unusual_characters_pass_through(tokenizer: Tokenizer, text: str) -> None:
    assert decode(tokenizer, render_one(renderer(TEXT, tokenizer), text=text)) == text


def test_messages_of_templates(tokenizer: Tokenizer) -> None:
    made = renderer(
        Prompt(
            messages=[
                Message(role="system", content="Answer {{ how }}."),
                Message(role="user", content="{{ columns['Review Text'] }}"),
            ]
        ),
        tokenizer,
    )
    assert made.columns == {"how", "Review Text"}
    ids = render_one(made, **{"how": "briefly", "Review Text": "nice", "unused": 1})
    system = {"role": "system", "content": "Answer briefly."}
    assert ids == chat_ids(tokenizer, [system, {"role": "user", "content": "nice"}])


def test_a_column_of_messages(tokenizer: Tokenizer) -> None:
    made = renderer(Prompt(column="chat"), tokenizer)
    messages: list[dict[str, str | None]] = [
        {"role": "user", "content": "one", "name": None},
        {"role": "assistant", "content": "two", "name": "x"},
        {"role": "user", "content": "three", "name": None},
    ]
    wanted = [{key: m[key] or "" for key in ("role", "content")} for m in messages]
    assert render_one(made, chat=messages) == chat_ids(tokenizer, wanted)


def test_a_column_of_texts(tokenizer: Tokenizer) -> None:
    wanted = chat_ids(tokenizer, [{"role": "user", "content": "[1]"}])
    assert render_one(renderer(Prompt(column="x"), tokenizer), x="[1]") == wanted
    text = renderer(Prompt(column="x", format="text"), tokenizer)
    assert render_one(text, x="[1]") == plain(tokenizer, "[1]")


def test_arguments_reach_the_chat_template(tokenizer: Tokenizer) -> None:
    made = renderer(Prompt(template="{{ text }}", chat_template_kwargs={"think": False}), tokenizer)
    assert decode(tokenizer, render_one(made, text="a")).endswith("assistant\n<think></think>")


def test_rows_keep_their_order_and_errors_their_rows(tokenizer: Tokenizer) -> None:
    rows = ["a", None, "b", "", "c" * 500, "d"]
    prompts = renderer(USER, tokenizer, 50).render(pa.table({"text": rows}))
    assert {row: error.kind for row, error in prompts.errors.items()} == {
        1: "null_prompt",
        3: "empty_prompt",
        4: "prompt_too_long",
    }
    assert prompts.token_ids.type == pa.list_(pa.int32())
    for row, ids in enumerate(prompts.token_ids.to_pylist()):
        if row in prompts.errors:
            assert ids is None
        else:
            assert ids == chat_ids(tokenizer, [{"role": "user", "content": str(rows[row])}])


def test_no_rows_and_no_columns(tokenizer: Tokenizer) -> None:
    assert (
        len(renderer(USER, tokenizer).render(pa.table({"text": pa.array([], "string")})).token_ids)
        == 0
    )
    made = renderer(Prompt(template="Say something."), tokenizer)
    assert len(made.render(pa.table({"text": ["a", "b"]})).token_ids) == 2


def test_a_renderer_can_be_sent_to_another_process(tokenizer: Tokenizer) -> None:
    made = renderer(USER, tokenizer, 20, "truncate_right")
    sent = pickle.loads(pickle.dumps(made))
    text = "the food was nice and the staff were friendly " * 9
    assert render_one(sent, text=text) == render_one(made, text=text)


# What is wrong with a row


def test_a_null_in_a_template(tokenizer: Tokenizer) -> None:
    kind, message = error_of(renderer(USER, tokenizer), text=None)
    assert kind == "null_prompt"
    assert message.startswith("prompt.template, line 1: 'text' is null; to print something else:")


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
@pytest.mark.parametrize(
    "prompt",
    [
        USER,
        TEXT,
        Prompt(column="text"),
        Prompt(
            messages=[
                Message(role="system", content="Be nice."),
                Message(role="user", content="{{ text }}"),
            ]
        ),
    ],
)
def test_an_empty_prompt(tokenizer: Tokenizer, prompt: Prompt, text: str) -> None:
    assert error_of(renderer(prompt, tokenizer), text=text) == (
        "empty_prompt",
        "the prompt is empty",
    )


def test_a_system_message_alone_is_a_prompt(tokenizer: Tokenizer) -> None:
    made = renderer(Prompt(messages=[Message(role="system", content="{{ text }}")]), tokenizer)
    assert render_one(made, text="a") == chat_ids(tokenizer, [{"role": "system", "content": "a"}])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "the list of messages is empty"),
        (["a"], "message 1 is not a struct of role and content"),
        ([None], "message 1 is not a struct of role and content"),
        ([{"role": "user"}], "message 1 lacks a role or a content"),
        ([{"role": None, "content": "a"}], "message 1 lacks a role or a content"),
        ([{"role": "user", "content": None}], "message 1 (user) has the content null, not a text"),
        (
            [{"role": "user", "content": [{"a": 1}]}],
            'message 1 (user) has the content [{"a": 1}], not a text',
        ),
        (
            [{"role": "end", "content": "a"}],
            "message 1 has the role 'end'; roles are assistant, developer",
        ),
        (7, "column 'chat' holds a value of type int, not a text or a list of messages"),
        ({"role": "user"}, "column 'chat' holds a value of type dict, not"),
    ],
)
def test_bad_messages(tokenizer: Tokenizer, value: object, message: str) -> None:
    kind, found = error_of(renderer(Prompt(column="chat"), tokenizer), chat=value)
    assert kind == "bad_messages"
    assert found.startswith(message)


def test_a_list_is_no_text(tokenizer: Tokenizer) -> None:
    made = renderer(Prompt(column="chat", format="text"), tokenizer)
    assert error_of(made, chat=[{"role": "user", "content": "a"}])[0] == "bad_messages"


def test_a_null_column(tokenizer: Tokenizer) -> None:
    wanted = ("null_prompt", "column 'x' is null")
    assert error_of(renderer(Prompt(column="x"), tokenizer), x=None) == wanted


def test_the_chat_template_refuses_one_row(tokenizer: Tokenizer) -> None:
    chats = [[{"role": role, "content": "a"}] for role in ("user", "tool", "user")]
    prompts = renderer(Prompt(column="chat"), tokenizer).render(pa.table({"chat": chats}))
    assert [ids is None for ids in prompts.token_ids.to_pylist()] == [False, True, False]
    assert prompts.errors[1].kind == "chat_template"
    assert prompts.errors[1].message == "the model's chat template: tools are not known"


def test_text_that_is_not_utf8_is_an_error_of_its_row(tokenizer: Tokenizer) -> None:
    offsets = pa.array([0, 1, 3, 4], pa.int32()).buffers()[1]
    column = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xff\xfeb")])
    for prompt in (USER, Prompt(column="text")):
        prompts = renderer(prompt, tokenizer).render(pa.table({"text": column}))
        assert [(row, error.kind) for row, error in prompts.errors.items()] == [(1, "bad_text")]
        assert len(prompts.token_ids[2]) == len(prompts.token_ids[0])


# Who may write control tokens


@quick
@given(hostile)
def test_a_chat_with_control_tokens_is_that_of_transformers(
    tokenizer: Tokenizer, text: str
) -> None:
    added = tokenizer.get_added_vocab()
    if text.strip():
        ids = render_one(renderer(USER, tokenizer), text=text)
        assert ids == chat_ids(tokenizer, [{"role": "user", "content": text}])
        own = {token: ids.count(added[token]) for token in CONTROL[:4]}
        assert own == {"<|im_start|>": 2, "<|im_end|>": 1, "<|endoftext|>": 0, "<think>": 0}


def test_tokens_that_are_neither_special_nor_the_templates_are_words(tokenizer: Tokenizer) -> None:
    ids = render_one(renderer(USER, tokenizer), text="a <unused> b")
    assert tokenizer.get_added_vocab()["<unused>"] in ids


@quick
@given(hostile, hostile)
def test_a_text_template_writes_its_own_tokens_only(
    bos_tokenizer: Tokenizer, one: str, other: str
) -> None:
    source = "<|im_start|>user\n{{ one }}{{ other }}<|im_end|>\n<{{ one }}|im_end|>{{ other }}"
    ids = render_one(
        renderer(Prompt(template=source, format="text"), bos_tokenizer), one=one, other=other
    )
    assert [token for token in ids if token < 3] == [0, 1, 2]
    wanted = f"<|im_start|>user\n{one}{other}<|im_end|>\n<{one}|im_end|>{other}"
    assert decode(bos_tokenizer, ids[1:]) == wanted


@quick
@given(hostile)
def test_a_text_template_without_tokens(bos_tokenizer: Tokenizer, text: str) -> None:
    if text.strip():
        ids = render_one(renderer(TEXT, bos_tokenizer), text=text)
        assert [token for token in ids if token < 3] == [0]
        assert decode(bos_tokenizer, ids[1:]) == text


def test_filters_make_no_tokens(bos_tokenizer: Tokenizer) -> None:
    source = "<|im_start|>{{ text | lower }}{{ text | replace('-', '') | lower }}"
    made = renderer(Prompt(template=source, format="text"), bos_tokenizer)
    ids = render_one(made, text="<|IM_END|> <|im_-end|>")
    assert [token for token in ids if token < 3] == [0, 1]


def test_a_text_column_is_the_users_own(tokenizer: Tokenizer) -> None:
    made = renderer(Prompt(column="x", format="text"), tokenizer)
    text = "<|im_start|>user\nhello<|im_end|>\n"
    assert render_one(made, x=text) == plain(tokenizer, text)
    assert render_one(made, x=text).count(2) == 1


# The length policy


def test_too_long_says_how_long(tokenizer: Tokenizer) -> None:
    made = renderer(USER, tokenizer, 20)
    count = len(chat_ids(tokenizer, [{"role": "user", "content": "0123456789" * 200}]))
    wanted = f"prompt has {count:,} tokens; the limit is 20"
    assert count > 1000
    assert error_of(made, text="0123456789" * 200) == ("prompt_too_long", wanted)


def reference(
    head: list[int], body: list[int], tail: list[int], limit: int, side: str
) -> list[int]:
    room = limit - len(head) - len(tail)
    return head + (body[-room:] if side == "truncate_left" else body[:room]) + tail


@quick
@given(texts, st.integers(17, 40), st.sampled_from(["truncate_left", "truncate_right"]))
def test_a_chat_keeps_its_frame(
    tokenizer: Tokenizer, text: str, limit: int, side: tokens.TooLong
) -> None:
    if not text.strip():
        return
    whole = chat_ids(tokenizer, [{"role": "user", "content": text}])
    ids = render_one(renderer(USER, tokenizer, limit, side), text=text)
    if len(whole) <= limit:
        assert ids == whole
    else:
        head = plain(tokenizer, "<|im_start|>user\n")
        tail = plain(tokenizer, "<|im_end|>\n<|im_start|>assistant\n")
        assert ids == reference(head, plain(tokenizer, text), tail, limit, side)


@quick
@given(texts, st.integers(2, 30), st.sampled_from(["truncate_left", "truncate_right"]))
def test_a_text_keeps_its_beginning_token(
    bos_tokenizer: Tokenizer,
    text: str,
    limit: int,
    side: tokens.TooLong,
) -> None:
    if text.strip():
        ids = render_one(renderer(TEXT, bos_tokenizer, limit, side), text=text)
        body = plain(bos_tokenizer, text)
        assert ids == ([0, *body] if len(body) < limit else reference([0], body, [], limit, side))


def test_cutting_keeps_the_system_prompt_and_the_last_words(tokenizer: Tokenizer) -> None:
    prompt = Prompt(
        messages=[
            Message(role="system", content="Classify."),
            Message(role="user", content="nice food"),
            Message(role="assistant", content="positive"),
            Message(role="user", content="{{ text }}"),
        ]
    )
    text = "count " * 200 + "the end"
    left = decode(
        tokenizer, render_one(renderer(prompt, tokenizer, 60, "truncate_left"), text=text)
    )
    right = decode(
        tokenizer, render_one(renderer(prompt, tokenizer, 60, "truncate_right"), text=text)
    )
    frame = "<|im_start|>system\nClassify.<|im_end|>\n<|im_start|>user\n"
    assert left.startswith((frame + "count", frame + " count"))
    assert left.endswith("count the end<|im_end|>\n<|im_start|>assistant\n")
    assert right.startswith(
        frame + "nice food<|im_end|>\n<|im_start|>assistant\npositive<|im_end|>"
    )
    assert re.search(r"count ?<\|im_end\|>\n<\|im_start\|>assistant\n$", right)


def test_a_frame_that_fills_the_limit(tokenizer: Tokenizer) -> None:
    made = renderer(USER, tokenizer, 5, "truncate_left")
    kind, message = error_of(made, text="abc " * 20)
    assert kind == "prompt_too_long"
    assert "tokens around the part that can be cut; the limit is 5" in message


@pytest.mark.parametrize("side", ["truncate_left", "truncate_right"])
def test_cut_rows_write_no_tokens_either(
    tokenizer: Tokenizer,
    side: tokens.TooLong,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokens, "MIN_WHOLE_CHARS", 64)
    monkeypatch.setattr(tokens, "CHARS_PER_TOKEN", 1)
    monkeypatch.setattr(tokens, "MARGIN_TOKENS", 4)
    for shift in range(40):
        text = "x" * shift + "<|im_end|>ab" * 60 + "y" * shift
        ids = render_one(renderer(USER, tokenizer, 60, side), text=text)
        assert len(ids) == 60
        assert (ids.count(1), ids.count(2)) == (2, 1)


@quick
@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=200), st.integers(12, 60), st.data())
def test_long_texts_are_cut_as_if_tokenized_whole(
    tokenizer: Tokenizer, words: list[str], limit: int, data: st.DataObject
) -> None:
    side: tokens.TooLong = data.draw(st.sampled_from(["error", "truncate_left", "truncate_right"]))
    text = "".join(words)
    if not text.strip():
        return
    table = pa.table({"text": [text]})
    whole = Renderer(USER, tokenizer, max_prompt_tokens=limit, too_long=side).render(table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "MIN_WHOLE_CHARS", 8)
        patch.setattr(tokens, "CHARS_PER_TOKEN", 1)
        patch.setattr(tokens, "MARGIN_TOKENS", 24)
        parts = Renderer(USER, tokenizer, max_prompt_tokens=limit, too_long=side).render(table)
    assert parts.token_ids == whole.token_ids
    assert {row: e.kind for row, e in parts.errors.items()} == {
        row: e.kind for row, e in whole.errors.items()
    }


@pytest.mark.parametrize("side", ["error", "truncate_left", "truncate_right"])
@pytest.mark.parametrize(
    ("unit", "count"),
    [
        ("the food was nice ", 600_000),
        (" ", 10_000_000),
        ("👋", 2_500_000),
        ("<|im_end|>", 100_000),
    ],
)
def test_ten_megabytes_take_a_moment(
    tokenizer: Tokenizer, side: tokens.TooLong, unit: str, count: int
) -> None:
    text = "x" + unit * count + "y"
    made = renderer(USER, tokenizer, 100, side)
    started = time.process_time()
    if side == "error":
        kind, message = error_of(made, text=text)
        assert kind == "prompt_too_long"
        chars = len(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")
        wanted = f"prompt has {chars:,} characters and more than 100 tokens; the limit is 100"
        assert message == wanted
    else:
        assert len(render_one(made, text=text)) == 100
    assert time.process_time() - started < 5


# What is checked before any row


def test_a_model_without_chat_template(bos_tokenizer: Tokenizer) -> None:
    with pytest.raises(ModelError, match="no chat template") as caught:
        renderer(USER, bos_tokenizer)
    assert "prompt.format: text" in caught.value.hint
    with pytest.raises(ModelError, match="no chat template"):
        check_prompt(USER, ["text"], None)
    check_prompt(TEXT, ["text"], None)


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        (Prompt(template="{{ txt }}"), "prompt.template uses the column 'txt'"),
        (
            Prompt(messages=[Message(role="user", content="{{ txt }}")]),
            "prompt.messages.0.content uses the column 'txt'",
        ),
        (Prompt(column="txt"), "prompt.column uses the column 'txt', which the input lacks"),
    ],
)
def test_a_column_that_the_input_lacks(prompt: Prompt, problem: str) -> None:
    with pytest.raises(SpecError, match=re.escape(problem)) as caught:
        check_prompt(prompt, ["id", "text"], "{{ messages }}")
    assert "did you mean 'text'? the columns are id, text" in str(caught.value)


def test_the_tokenizer_is_loaded_once(tiny_tokenizer_folder: Path, tokenizer: Tokenizer) -> None:
    assert load_tokenizer(tiny_tokenizer_folder) is tokenizer


def broken(source: Path, folder: Path, **files: str | None) -> Path:
    """Copy a tokenizer, with some files replaced or left out."""
    for file in source.iterdir():
        text = files.get(file.stem, file.read_text())
        if text is not None:
            (folder / file.name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "problem", "hint"),
    [
        ({"tokenizer": None}, "has no tokenizer.json", "save_pretrained"),
        ({"tokenizer": "{}"}, "the tokenizer can't be loaded", "complete"),
        ({"tokenizer": "{"}, "the tokenizer can't be loaded", "complete"),
        ({"tokenizer_config": "{"}, "the tokenizer can't be loaded", "complete"),
        (
            {
                "config": '{"model_type": "unheard", "auto_map": {"AutoConfig": "evil.Config"}}',
                "tokenizer_config": '{"auto_map": {"AutoTokenizer": [null, "evil.Tokenizer"]}}',
            },
            "the tokenizer can't be loaded",
            "code from its own folder: see model.trust_remote_code",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_loaded(
    tiny_tokenizer_folder: Path,
    tmp_path: Path,
    files: dict[str, str | None],
    problem: str,
    hint: str,
) -> None:
    folder = broken(tiny_tokenizer_folder, tmp_path, **files)
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError) as caught:
        load_tokenizer(folder)
    assert problem in caught.value.problem
    assert str(folder) in caught.value.problem
    assert hint in caught.value.hint


# Seeds


def test_a_rows_seed_is_fixed_for_ever() -> None:
    assert row_seed(0, "a.parquet:0") == 4573587908670183962
    assert row_seed(1, "a.parquet:0") != row_seed(0, "a.parquet:0")


@given(st.integers(0, 2**63 - 1), st.text())
def test_a_rows_seed_is_a_positive_int64(seed: int, row_id: str) -> None:
    assert 0 <= row_seed(seed, row_id) < 2**63


def test_seeds_do_not_collide() -> None:
    ids = [f"part-{random.randrange(9)}.parquet:{row}" for row in range(10_000)]
    assert len({row_seed(7, row_id) for row_id in ids}) == len(ids)
