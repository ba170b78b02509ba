"""Texts of strangers reach no terminal raw."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest

from quantbatch import cli, console
from quantbatch.errors import InputError

HOSTILE = "\x1b]0;title\x07\x1b[2J\x1b[31m\x9b1A\r\x08\u202egnp.exe\u2066[bold]x[/bold] <script>"
RAW = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def sampled(**fields: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("error", "prompt", "completion", "answer"))
    counts = {"prompt_tokens": 1, "completion_tokens": 1, "finish_reason": "stop"}
    return {"row_id": HOSTILE, **empty, **counts, **fields}


def test_nothing_that_a_terminal_obeys_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    error = {"type": HOSTILE, "message": HOSTILE}
    console.say_sample(sampled(error=error))
    console.say_sample(sampled(prompt=HOSTILE, completion=HOSTILE, answer={HOSTILE: [HOSTILE]}))
    kind = {"status": "error", "error_type": HOSTILE, "rows": 1}
    example = {"row_id": HOSTILE, "message": HOSTILE, "prompt": HOSTILE}
    faults = {"name": HOSTILE, "rows": 1, "rows_done": 1, "statuses": [HOSTILE]}
    kinds = [kind | {"examples": [example]}]
    console.say_faults(faults | {"kinds": kinds, "damaged": {HOSTILE: HOSTILE}})
    console.complain(InputError(HOSTILE, HOSTILE))
    console.note(HOSTILE)
    console.say(console.facts(console.unreadable_lines({HOSTILE: HOSTILE})))
    console.say_document({"text": HOSTILE})
    printed = "".join(capsys.readouterr())
    assert RAW.findall(printed) == []
    assert printed.count("\\x1b]0;title") > 10
    assert "[bold]x[/bold]" in printed  # markup has no meaning


def test_what_the_log_warns_of_is_printed_plain(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("test_console")
    handler = console.Warnings(logging.WARNING)
    logger.addHandler(handler)
    logger.warning("%s in s3://me:secret@bucket/a?X-Amz-Signature=secret", HOSTILE)
    logger.removeHandler(handler)
    printed = capsys.readouterr().err
    assert RAW.findall(printed) == []
    assert "in s3://bucket/a" in printed
    assert "secret" not in printed


def test_a_command_prints_warnings_so_and_leaves_no_trace(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(**_: object) -> None:
        logging.getLogger("quantbatch.checks").warning("a model named %s", HOSTILE)
        raise SystemExit(0)

    monkeypatch.setattr(cli, "app", warn)
    before = list(logging.getLogger("quantbatch").handlers)
    with pytest.raises(SystemExit):
        cli.main(["validate"])
    assert r"a model named \x1b]0;title" in capsys.readouterr().err
    assert logging.getLogger("quantbatch").handlers == before
