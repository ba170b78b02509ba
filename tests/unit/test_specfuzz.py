"""Whatever a spec file or an override holds: a job, or a SpecError that says where, and at once.

QUANTBATCH_TEST_SPECS=5000 makes it longer, QUANTBATCH_TEST_SEED=... begins elsewhere.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from quantbatch import cli
from quantbatch.errors import SpecError
from quantbatch.specfile import load_spec

if TYPE_CHECKING:
    from tests.conftest import Count

SPECS = int(os.environ.get("QUANTBATCH_TEST_SPECS", "500"))
SEED = int(os.environ.get("QUANTBATCH_TEST_SEED", "6"))
ROOT = Path(__file__).parents[2]
CONFIGS = sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("quantbatch/*.yaml")])
LONGEST_S = 0.1

VALUES = [
    "", "~", "null", "yes", "no", "on", "off", "Norway", "NO", "0", "-1", "1e400", "1e-3", ".nan", "-.inf",
    "0x1F", "1_000", "1:30:45", "9" * 40, "9" * 5000, "2026-01-01", "2026-13-45", "2026-01-01T10:00:00Z",
    "[]", "{}", "[[[[1]]]]", "[1, a, null, {b: c}]", "{a: {b: {c: 1}}}", "{kind: nf4}", "{kind: nonsense}",
    "{2026-01-01: a}", "{1.5: a}", "{~: a}", "{true: a}", "{? [a, b] : c}", "{<<: {a: b}}", "{<<: 3}",
    "!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!python/tuple [1, 2]", "!!python/none",
    "!!binary aGFsbG8=", "!!binary '*'", "!!set {a, b}", "!!omap [a: b]", "!!pairs [a: b]", "!!int abc", "!!float x",
    "!!bool 3", "!!str 3", "!!timestamp x", "!own x", "!<tag:x> y", "&a [*a]", "&a {b: *a}", "*unknown", "&a &b c",
    '"\\0"', '"\\ud800"', '"\\u202e\\x1b[31m"', "'" + "x" * 70_000 + "'", "|\n  text\n   more", ">-\n  text", "- a\n- b",
    "{{ text }}", "'{{ text'", "'{% for %}'", "@x", "`x`", "%x", "?", ":", "- ", "\t", "\x07", "\x85", "\u2028",
    "s3://", "s3:///x", "ftp://x/y", "http://[", "s3://a:b@c/d", "../..", "/", "~nobody-of-that-name/x",
]  # fmt: skip
"""What a field may be given."""
SPLICES = [
    "\n",
    ":",
    " ",
    "- ",
    "{",
    "}",
    "[",
    "]",
    '"',
    "'",
    "#",
    "|",
    "&a ",
    "*a",
    "!!",
    "\t",
    "---\n",
    "...\n",
]


def nested(rng: random.Random) -> str:
    depth = rng.choice([3, 30, 300, 3000])
    return rng.choice(["[" * depth + "]" * depth, "{a: " * depth + "1" + "}" * depth])


def fields(text: str) -> list[re.Match[str]]:
    return [*re.finditer(r"^( *(?:- )?)(\w+):(.*)$", text, re.MULTILINE)]


def mutated(text: str, rng: random.Random) -> str:
    """Return a spec with one thing wrong, or right in another way."""
    found = rng.choice(fields(text))
    value = rng.choice(VALUES) if rng.random() < 0.9 else nested(rng)
    lines = text.splitlines(keepends=True)
    line, place = rng.randrange(len(lines)), rng.randrange(len(text))
    match rng.randrange(9):
        case 0 | 1 | 2:
            return text[: found.start(3)] + " " + value + text[found.end(3) :]
        case 3:
            name = list(found[2])
            name[rng.randrange(len(name))] = rng.choice("abz_-1é")
            return text[: found.start(2)] + "".join(name) + text[found.end(2) :]
        case 4:
            return "".join([*lines[:line], *lines[line + 1 :]])
        case 5:
            return "".join([*lines[: line + 1], *lines[line:]])
        case 6:
            return "".join(
                [*lines[:line], " " * rng.randrange(1, 5) + lines[line], *lines[line + 1 :]]
            )
        case 7:
            return text[:place] + rng.choice(SPLICES) + text[place:]
        case _:
            return text[:place] + text[place + rng.randrange(1, 20) :]


def dotted(value: object, prefix: str = "") -> list[str]:
    if not isinstance(value, dict):
        return []
    return [n for k, v in value.items() for n in (f"{prefix}{k}", *dotted(v, f"{prefix}{k}."))]


def overridden(text: str, rng: random.Random) -> str:
    """Return an override of a field that a spec has, or nearly has."""
    name = rng.choice(dotted(yaml.safe_load(text)))
    if rng.random() < 0.3:
        name = rng.choice(
            [name[:-1], name + "x", name + ".x", name.replace(".", "..", 1), "", "0", "a.0"]
        )
    return f"{name}={rng.choice(VALUES) if rng.random() < 0.9 else nested(rng)}"


@pytest.mark.timeout(900)
def test_a_mutated_spec_is_a_job_or_a_spec_error(tmp_path: Path, count: Count) -> None:
    rng = random.Random(SEED)
    path = tmp_path / "job.yaml"
    texts = [config.read_text() for config in CONFIGS]
    tally: Counter[str] = Counter()
    times: list[float] = []
    for number in range(SPECS):
        text = rng.choice(texts)
        overrides = [overridden(text, rng)] if number % 4 == 3 else []
        if not overrides:
            for _ in range(rng.choice([1, 1, 1, 2, 5])):
                text = mutated(text, rng) if fields(text) else text
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        replay = f"seed={SEED} number={number} overrides={overrides!r:.300}"
        began = time.process_time()
        try:
            load_spec(path, overrides)
            tally["jobs"] += 1
        except SpecError as error:
            tally["refused"] += 1
            problems = error.problems
            assert problems, replay
            for problem in problems:
                starts = (f"{path}:", "--set ") if overrides else (f"{path}:",)
                assert problem.problem.startswith(starts), (replay, problem)
                assert len(problem.problem) < 2000, (replay, problem)
                tally["with a line"] += bool(
                    re.match(rf"{re.escape(str(path))}:\d+: |--set ", problem.problem)
                )
                tally["problems"] += 1
                tally["with a remedy"] += bool(problem.hint)
        except Exception as error:  # the replay must be told, whatever it is
            raise AssertionError(replay) from error
        took = time.process_time() - began
        times.append(took)
        assert took < 20 * LONGEST_S, (replay, took)  # one of 70 kB takes 0.2 s
    times.sort()
    usual, slowest = times[len(times) * 95 // 100], times[-1]
    count(f"specs={SPECS} seed={SEED} p95={usual:.3f} s slowest={slowest:.3f} s {dict(tally)}")
    assert usual < LONGEST_S
    assert tally["refused"] > SPECS / 2
    assert tally["with a line"] > 0.97 * tally["problems"]


def test_the_command_line_refuses_with_2_and_no_traceback(tmp_path: Path, count: Count) -> None:
    rng = random.Random(SEED)
    path = tmp_path / "job.yaml"
    texts = [config.read_text() for config in CONFIGS]
    refused = 0
    while refused < 40:
        path.write_text(mutated(rng.choice(texts), rng), encoding="utf-8", errors="surrogatepass")
        try:
            load_spec(path)
        except SpecError:
            refused += 1
        else:
            continue
        out, err = io.StringIO(), io.StringIO()
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as left,
        ):
            cli.main(["validate", str(path), "--json"])
        assert left.value.code == 2, err.getvalue()
        assert "Traceback" not in err.getvalue()
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", err.getvalue())
        assert json.loads(out.getvalue().splitlines()[-1])["exit_code"] == 2
    count(f"specs={refused} exit_code=2 tracebacks=0")
