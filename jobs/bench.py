"""Measure what surrounds a model, and the engine: each command prints one JSON document.

    python jobs/bench.py pipeline    rows/s and the driver's memory, 100,000 and 1,000,000 rows
    python jobs/bench.py plan        a job of 100,000,000 rows: to the first commit, and half done
    python jobs/bench.py startup     from `quantbatch run` to the first committed row, by part
    python jobs/bench.py engine      the engine against generate, pipeline, continuous batching
    python jobs/bench.py label       labels, scores and vectors against generating and padded loops
    python jobs/bench.py engine-job  a job through Ray against its engine alone; two replicas
    python jobs/bench.py peers       the engine against those of other packages, if installed
    python jobs/bench.py gpu ...     a card: memory, speed, loading; its help lists the parts
    python jobs/bench.py loading     quantizing at load against the cache: seconds, bytes, memory
    python jobs/bench.py grammar     libraries of token masks, at a vocabulary of 150,000
    python jobs/bench.py structured  structured JSON against free text of as many tokens

In the first three the engine is `echo`, which answers with the beginning of the prompt: everything
else is real, the tokenizer of the quickstart's model included. The others are in `enginebench`.
Each run is a process of its own. `gpu` is in `gpubench`, needs no Ray, and prints many documents.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # `python jobs/bench.py` would find only what lies beside it

from jobs.gpubench.commands import app as gpu_commands  # noqa: E402

if TYPE_CHECKING:
    from quantbatch.spec import JobSpec

MODEL = ROOT / "configs" / "quickstart" / "model"
COMMAND = str(Path(sys.executable).with_name("quantbatch"))
TEXT = "the batch reads every row once and writes one answer for each of them"
WORDS = tuple(TEXT.split())

app = typer.Typer(add_completion=False, help=__doc__)
app.add_typer(gpu_commands, name="gpu")
Rows = Annotated[list[int], typer.Option(help="Rows of a job; give it several times for several.")]
Cases = Annotated[list[str], typer.Option(help="WORKLOAD-BITS; give it several times for several.")]
Only = Annotated[
    str, typer.Option(help="Parts of the names of the contenders to run, with | between them.")
]


def job(folder: Path, **changes: Any) -> JobSpec:
    """Return the spec of a benchmark: echo over a folder of Parquet."""
    from quantbatch.spec import JobSpec

    fields = {
        "name": "bench",
        "input": {"uri": str(folder / "in")},
        "model": {"id": str(MODEL), "bits": 16},
        "prompt": {"template": "{{ text }}"},
        "sampling": {"max_new_tokens": 16},
        "engine": {"kind": "echo"},
        "cluster": {"cpu_fallback": True, "gpus_per_replica": 0},
        "output": {"uri": str(folder / "out"), "keep": ["id"]},
    }
    return JobSpec.model_validate(fields | changes)


def write_input(folder: Path, rows: int, *, files: int) -> None:
    """Write Parquet files of texts of about 100 characters, no two of them equal."""
    folder.mkdir(parents=True)
    per_file = -(-rows // files)
    for number in range(files):
        ids = range(number * per_file, min((number + 1) * per_file, rows))
        texts = [f"{i} " + " ".join(WORDS[(i + k) % len(WORDS)] for k in range(20)) for i in ids]
        table = pa.table({"id": pa.array(ids, pa.int64()), "text": texts})
        pq.write_table(table, folder / f"{number:05d}.parquet", compression="zstd")


@app.command()
def pipeline(rows: Rows = [100_000, 1_000_000]) -> None:  # noqa: B006 - typer reads it
    """Whole jobs of short rows: rows/s, and the most memory that the driver takes."""
    runs = [_in_own_process("run-echo", rows=count) for count in rows]
    _print({"benchmark": "pipeline", "runs": runs})


@app.command("run-echo", hidden=True)
def run_echo(rows: int = 100_000) -> None:
    """Run one job in this process and print its figures."""
    from quantbatch import pipeline as program

    with tempfile.TemporaryDirectory(prefix="quantbatch-bench-") as name:
        folder = Path(name)
        write_input(folder / "in", rows, files=8)
        before = _peak_rss_bytes()
        report = program.run(job(folder))
        written = pq.ParquetDataset(folder / "out").read(columns=["row_id"]).num_rows
    assert report.counts.ok == written == rows
    figures = report.run
    print(
        json.dumps(
            {
                "rows": rows,
                "rows_per_s": round(figures.rows_per_s),
                "rows_per_s_with_startup": round(rows / (figures.total_s or 1)),
                "prompt_tokens": report.counts.prompt_tokens,
                "driver_peak_mib_before": before >> 20,
                "driver_peak_mib": _peak_rss_bytes() >> 20,
                **{
                    k: v
                    for k, v in figures.to_json().items()
                    if k.endswith("_s") and "per" not in k
                },
            }
        )
    )


@app.command()
def plan(rows: int = 100_000_000, files: int = 1000) -> None:
    """A job too large to run here: planned, first chunk committed, killed, resumed half done."""
    _print({"benchmark": "plan"} | _in_own_process("plan-large", rows=rows, files=files))


@app.command("plan-large", hidden=True)
def plan_large(rows: int = 100_000_000, files: int = 1000) -> None:
    """Plan the large job, start it until its first commit, and start it again half done."""
    with tempfile.TemporaryDirectory(prefix="quantbatch-bench-") as name:
        folder = Path(name)
        _write_large_input(folder / "in", rows // files, files=files)
        spec = job(folder)
        first = _until_first_commit(folder)
        _pretend_half_done(spec)
        again = _until_first_commit(folder)
        print(json.dumps({"rows": rows, "files": files, "first": first, "half_done": again}))


def _write_large_input(folder: Path, rows: int, *, files: int) -> None:
    """Write files with true footers and few bytes: one text, dictionary-encoded, in every row."""
    folder.mkdir(parents=True)
    text = pa.array([" ".join(WORDS)], pa.string())
    column = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), rows), text)
    pq.write_table(pa.table({"id": pa.repeat(1, rows), "text": column}), folder / "00000.parquet")
    for number in range(1, files):
        shutil.copy(folder / "00000.parquet", folder / f"{number:05d}.parquet")


def _until_first_commit(folder: Path) -> dict[str, Any]:
    """Run the job in a process of its own until it commits something new; then kill it."""
    spec_path = folder / "job.yaml"
    spec_path.write_text(json.dumps(job(folder).model_dump(mode="json", exclude_unset=True)))
    commits = folder / "out" / "_quantbatch" / "commits"
    known = len(os.listdir(commits)) if commits.exists() else 0  # noqa: PTH208 - counting, quickly
    started = time.monotonic()
    process = subprocess.Popen(
        [COMMAND, "run", str(spec_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    peak = 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = max(peak, *(int(s.split()[1]) for s in status.splitlines() if s.startswith("VmHWM")))
        if commits.exists() and len(os.listdir(commits)) > known:  # noqa: PTH208
            break
        time.sleep(0.1)
    elapsed = time.monotonic() - started
    assert process.poll() is None, "the job ended before its first commit"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return {"to_first_commit_s": round(elapsed, 1), "driver_peak_mib": peak >> 10}


def _pretend_half_done(spec: JobSpec) -> None:
    """Write the records of the first half of the shards, as if they were published."""
    from quantbatch.commits import Published, shard_key
    from quantbatch.preflight import prepare
    from quantbatch.records import Counts

    prepared = prepare(spec)
    for shard in prepared.plan.shards[: len(prepared.plan.shards) // 2]:
        published = Published(shard.id, shard.key, Counts(ok=shard.rows))
        prepared.ledger.store.put(shard_key(shard.id), published.to_bytes())


@app.command()
def startup(config: Path = Path("configs/quickstart.yaml")) -> None:
    """A whole run of a spec, into a fresh output: where the time to the first commit goes."""
    with tempfile.TemporaryDirectory(prefix="quantbatch-bench-") as name:
        command = [COMMAND, "run", "--json", str(config)]
        started = time.monotonic()
        done = subprocess.run(
            [*command, "--set", f"output.uri={name}/out"],
            capture_output=True,
            text=True,
            check=True,
        )
        elapsed = time.monotonic() - started
    report = json.loads(done.stdout.splitlines()[-1])
    _print({"benchmark": "startup", "wall_s": round(elapsed, 2), "run": report["run"]})


@app.command()
def engine(
    cases: Cases = ["mixed-32", "mixed-4", "prefix-32", "duplicates-32"],  # noqa: B006
    rows: int = 256,
    repetitions: int = 2,
    threads: int = 2,
    only: Only = "",
) -> None:
    """The continuous engine against what a user of transformers would write instead.

    Fails, after printing, if any contender gives other tokens than the first in float32.
    """
    documents = [
        _in_own_process(
            "run-engine", case=case, rows=rows, repetitions=repetitions, threads=threads, only=only
        )
        for case in cases
    ]
    _print({"benchmark": "engine", "cases": documents})
    _agree(documents)


@app.command()
def label(
    cases: Cases = [  # noqa: B006
        *("classify-32", "classify-4", "short-32", "shared-32"),
        *("score-32", "embed-32"),
    ],
    rows: int = 128,
    repetitions: int = 2,
    threads: int = 2,
) -> None:
    """Labels, scores and vectors against generating them, and against padded loops."""
    documents = [
        _in_own_process("run-label", case=case, rows=rows, repetitions=repetitions, threads=threads)
        for case in cases
    ]
    _print({"benchmark": "label", "cases": documents})


@app.command("run-label", hidden=True)
def run_label(
    case: str = "classify-32", rows: int = 128, repetitions: int = 2, threads: int = 2
) -> None:
    """Run one case in this process and print its figures."""
    from jobs.enginebench import model
    from jobs.labelbench import race

    with tempfile.TemporaryDirectory(prefix="quantbatch-bench-") as name:
        folder = Path(name, "model")
        parameters = model.write(folder)
        found = race.race(folder, case, rows=rows, repetitions=repetitions, threads=threads)
    print(json.dumps({"parameters": parameters} | found))


@app.command("run-engine", hidden=True)
def run_engine(
    case: str = "mixed-32",
    rows: int = 256,
    repetitions: int = 2,
    threads: int = 2,
    only: str = "",
) -> None:
    """Run one case in this process and print its figures."""
    from jobs.enginebench import model, race

    with tempfile.TemporaryDirectory(prefix="quantbatch-bench-") as name:
        folder = Path(name, "model")
        parameters = model.write(folder)
        found = race.race(
            folder, case, rows=rows, repetitions=repetitions, threads=threads, only=only
        )
    print(json.dumps({"parameters": parameters} | found))


@app.command()
def peers(rows: int = 256, repetitions: int = 2, threads: int = 2, only: Only = "") -> None:
    """The engine against those of other packages; `enginebench/outside.py` says how to get them."""
    found = _in_own_process(
        "run-peers", rows=rows, repetitions=repetitions, threads=threads, only=only
    )
    _print({"benchmark": "peers"} | found)


@app.command("run-peers", hidden=True)
def run_peers(rows: int = 256, repetitions: int = 2, threads: int = 2, only: str = "") -> None:
    """Run the engine and what is installed of others, and print their figures."""
    from jobs.enginebench import model, race

    with tempfile.TemporaryDirectory(prefix="quantbatch-bench-") as name:
        folder = Path(name, "model")
        parameters = model.write(folder)
        found = race.race_outside(
            folder, rows=rows, repetitions=repetitions, threads=threads, only=only
        )
    print(json.dumps({"parameters": parameters} | found))


@app.command("engine-job")
def engine_job(rows: int = 512, repetitions: int = 2, kind: str = "continuous") -> None:
    """A job through Ray against its engine alone, with 1 and 2 threads; then two replicas."""
    from jobs.enginebench import verdicts

    runs = []
    for _ in range(repetitions):
        for threads in (1, 2):
            runs.append(_in_own_process("run-alone", rows=rows, threads=threads, kind=kind))
            runs.append(
                _in_own_process("run-job", rows=rows, replicas=1, threads=threads, kind=kind)
            )
        runs.append(_in_own_process("run-job", rows=rows, replicas=2, threads=1, kind=kind))
    _print({"benchmark": "engine-job", "compared": verdicts.compared(runs), "runs": runs})


@app.command("run-job", hidden=True)
def run_job(rows: int = 512, replicas: int = 1, threads: int = 1, kind: str = "continuous") -> None:
    """Run one job of the engine in this process and print its figures."""
    from jobs.enginebench import model, whole

    with tempfile.TemporaryDirectory(prefix="quantbatch-bench-") as name:
        model.write(Path(name, "model"))
        found = whole.job(Path(name), rows=rows, kind=kind, replicas=replicas, threads=threads)
    print(json.dumps(found))


@app.command("run-alone", hidden=True)
def run_alone(rows: int = 512, threads: int = 1, kind: str = "continuous") -> None:
    """Answer the rows of that job by its engine alone and print the figures."""
    from jobs.enginebench import model, whole

    with tempfile.TemporaryDirectory(prefix="quantbatch-bench-") as name:
        model.write(Path(name, "model"))
        found = whole.alone(Path(name), rows=rows, kind=kind, threads=threads)
    print(json.dumps(found))


@app.command()
def loading(rounds: int = 3, threads: int = 1) -> None:
    """Quantizing at load against a cache of quantized weights, on the disk and on S3.

    Fails, after printing, if any way gives other scores than quantizing at load.
    """
    from jobs.enginebench import loads

    with (
        tempfile.TemporaryDirectory(prefix="quantbatch-bench-") as name,
        loads.s3_server() as endpoint,
    ):
        _in_own_process("write-models", folder=name)
        options: dict[str, int | str] = {"folder": name, "endpoint": endpoint, "threads": threads}
        for way in loads.ways():  # the first load fills a cache
            _in_own_process("run-load", way=way, **options)
        runs = []
        for _ in range(rounds):
            for way in loads.ways():
                if way == "s3":  # a node that has no copy yet
                    shutil.rmtree(Path(name, "node-s3"))
                runs.append(_in_own_process("run-load", way=way, **options))
                print(f"load average {os.getloadavg()[0]:.1f}: {way}", file=sys.stderr, flush=True)
    print(loads.table(runs), file=sys.stderr)
    compared = loads.compared(runs)
    _print({"benchmark": "loading", "threads": threads, "compared": compared, "runs": runs})
    if not compared["equal_logits"]:
        sys.exit("other scores than those of quantizing at load")


@app.command()
def grammar(words: int = 150_000, rounds: int = 2) -> None:
    """Libraries of token masks: compiling a schema, filling the masks of 32 rows, memory."""
    from jobs.labelbench import grammars

    runs = [
        _in_own_process("run-grammar", library=name, words=words)
        for _ in range(rounds)
        for name in grammars.installed()
    ]
    _print({"benchmark": "grammar", "runs": runs})


@app.command("run-grammar", hidden=True)
def run_grammar(library: str = "llguidance", words: int = 150_000) -> None:
    """Measure one library in this process and print its figures."""
    from jobs.labelbench import grammars, vocabulary

    tokenizer = vocabulary.make(words)
    found = grammars.measure(library, tokenizer, words)
    print(json.dumps({"library": library, "words": words} | found))


@app.command()
def structured(rows: int = 128, rounds: int = 3, threads: int = 1) -> None:
    """Structured JSON against free text of as many tokens, at two sizes of vocabulary."""
    runs = [
        _in_own_process("run-structured", words=4096, rows=rows, rounds=rounds, threads=threads),
        _in_own_process(
            "run-structured",
            words=4096,
            rows=rows,
            rounds=rounds,
            threads=threads,
            temperature="1",
        ),
        _in_own_process("run-structured", words=150_000, rows=64, rounds=2, threads=threads),
    ]
    _print({"benchmark": "structured", "threads": threads, "runs": runs})


@app.command("run-structured", hidden=True)
def run_structured(
    words: int = 4096, rows: int = 128, rounds: int = 3, threads: int = 1, temperature: float = 0.0
) -> None:
    """Measure both kinds of answers in this process and print the figures."""
    import torch

    from jobs.labelbench import structured as measured

    torch.set_num_threads(threads)
    found = measured.measure(words, rows=rows, rounds=rounds, temperature=temperature)
    print(json.dumps(found))


@app.command("write-models", hidden=True)
def write_models(folder: str = "") -> None:
    """Write the models of `loading`, in a process that forgets them."""
    from jobs.enginebench import loads

    print(json.dumps({"parameters": loads.write_models(Path(folder))}))


@app.command("run-load", hidden=True)
def run_load(folder: str = "", way: str = "local", endpoint: str = "", threads: int = 1) -> None:
    """Load the model once in this process and print its figures."""
    from jobs.enginebench import loads

    print(json.dumps(loads.measure(Path(folder), way, endpoint, threads)))


def _agree(documents: list[dict[str, Any]]) -> None:
    """Fail if a contender gave other tokens than the first one where all must be equal."""
    from jobs.enginebench import verdicts

    wrong = [name for document in documents for name in verdicts.disagreeing(document)]
    if wrong:
        sys.exit(f"other answers than the first contender's: {', '.join(wrong)}")


def _in_own_process(command: str, **options: int | str) -> dict[str, Any]:
    """Run a hidden command; what it writes to stderr is shown as it comes."""
    arguments = [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(
        [sys.executable, __file__, command, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.returncode)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _print(document: dict[str, Any]) -> None:
    machine = {"cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps(document | {"machine": machine}, indent=1))


if __name__ == "__main__":
    app()
