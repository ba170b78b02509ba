"""Fixtures that several test files share."""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from quantbatch.input import sources

SENTENCES = [
    "The food was nice and the staff were friendly, so we will come again next week.",
    "Classify the review as positive or negative and answer with one word only.",
    "A function that returns the number of words in a text, and its docstring.",
    "def count_words(text): return len(text.split())  # 0 1 2 3 4 5 6 7 8 9",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('tools are not known') }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if think is defined and not think %}<think></think>{% endif %}{% endif %}"
)

# The same examples in each run: a test fails since something changed. Others are drawn with
# `--hypothesis-profile default`, as by `make soak`.
settings.register_profile("same", derandomize=True)
settings.load_profile("same")

Count = Callable[[str], None]
COUNTED = "counted"


@pytest.fixture
def count(record_property: Callable[[str, object], None]) -> Count:
    """Have what a test counted shown at the end of the run: kills, faults, wrong outputs, ..."""
    return lambda text: record_property(COUNTED, text)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what was counted, also in other processes."""
    reports = [
        report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)
    ]
    lines = [
        f"{report.location[2]}: {text}"
        for report in reports
        if report.when == "call"
        for name, text in report.user_properties
        if name == COUNTED
    ]
    if lines:
        terminalreporter.section("what was counted")
        for line in sorted(lines):
            terminalreporter.write_line(line)


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Leave out what Ray's own threads say: those that another test began log when they like."""
    main = threading.main_thread().ident

    def wanted(record: logging.LogRecord) -> bool:
        return record.thread == main or not record.name.startswith("ray")

    caplog.handler.addFilter(wanted)
    yield caplog
    caplog.handler.removeFilter(wanted)


@pytest.fixture(autouse=True)
def no_file_left_open() -> Iterator[None]:
    """Close what a test has read from: Python would warn in a later one that nobody did."""
    yield
    sources.close_readers()


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE tokenizer of 400 tokens and a ChatML template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>"), AddedToken("<unused>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder
