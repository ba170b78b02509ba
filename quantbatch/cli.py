"""The command line. Each command is a few lines: load the spec, call one function, show what it
returns.

`--help` answers at once, and `plan` in a second or two, most of which imports a tokenizer from
transformers. So nothing here is imported before a command needs it, and Ray and torch only by
commands that run a model.

Results go to stdout; errors and progress to stderr. With `--json` the last line on stdout is one
JSON document, whatever happens. Exit codes are those of `errors.py`, and 70 for a fault of
quantbatch itself.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import sys
import traceback
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from quantbatch import __version__, console
from quantbatch.errors import JobError, Refused, SpecError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from quantbatch.errors import DoesNotFit
    from quantbatch.model.cards import Card
    from quantbatch.sample import Sampled
    from quantbatch.spec import JobSpec, Storage

EXIT_INTERRUPTED = 130
EXIT_OUR_FAULT = 70
"""EX_SOFTWARE of sysexits.h; Python's own 1 would mean a job that is done with too many errors."""
SCHEMA_NAME = "quantbatch.schema.json"
_WITHOUT_PANDAS = frozenset({"plan", "validate", "status", "verify", "formats"})

app = typer.Typer(
    name="quantbatch",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="The job's YAML file.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Set a field of the spec, such as model.bits=8; may be given several times.",
    ),
]
Extend = Annotated[
    bool,
    typer.Option("--extend", help="Add input files that came after the job was planned."),
]
OnCard = Annotated[
    str | None,
    typer.Option(
        "--card", metavar="NAME", help="Plan for this card, such as 'RTX 4090', L4 or A100-80G."
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="End stdout with one JSON document on a line.")
]


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code.

    Args:
        args: What follows the command's name; None takes it from the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file name or a row may hold what the terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")
    args = sys.argv[1:] if args is None else list(args)
    if _WITHOUT_PANDAS & set(args[:1]):
        _keep_pandas_away()
    app(args=args, prog_name="quantbatch")
    raise AssertionError("typer leaves by itself")


class _NoPandas:
    """A finder of modules by which pandas is not installed."""

    @staticmethod
    def find_spec(name: str, *_: object) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name, name=name)


def _keep_pandas_away() -> None:
    """Have pyarrow look for pandas now, once and for all, and not find it.

    It would import it to see whether a list is a Series (`_is_array_like`, 26.0), which takes a
    quarter of the time of `plan`. Can go when pyarrow asks sys.modules instead.
    """
    import pyarrow as pa

    sys.meta_path.insert(0, _NoPandas)
    try:
        pa.array([0])
    finally:
        sys.meta_path.remove(_NoPandas)


def _version(asked: bool) -> None:
    if asked:
        console.say(f"quantbatch {__version__}")
        raise typer.Exit


@app.callback()
def quantbatch(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Batch inference with quantized transformers models on Ray: every row answered exactly once.

    Exit codes:
    0 done
    1 done with more errors than allowed, or with input that can't be read; not proven
    2 bad spec, input or surroundings
    3 refused, or the model does not fit
    70 a fault of quantbatch itself
    75 stopped on the way: the same command continues
    130 Ctrl-C: likewise
    """
    del version


@contextlib.contextmanager
def _outcome(as_json: bool) -> Iterator[None]:
    """Turn what ends a command early into messages, a document and an exit code."""
    try:
        yield
    except JobError as error:
        console.complain(error)
        _leave(console.error_document(error), as_json)
    except KeyboardInterrupt:
        said = "interrupted; the same command continues where it was"
        console.note(said)
        _leave({"outcome": "interrupted", "exit_code": EXIT_INTERRUPTED, "error": said}, as_json)
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:  # noqa: BLE001 - the last line on stdout is a document whatever happens
        sys.stderr.write(console.plain(traceback.format_exc()))
        said = f"{type(error).__name__}: {error}"
        _leave({"outcome": "crashed", "exit_code": EXIT_OUR_FAULT, "error": said}, as_json)


def _leave(document: dict[str, object], as_json: bool) -> NoReturn:
    document.setdefault("hint", "")
    if as_json:
        console.say_document(document)
    code = document["exit_code"]
    assert isinstance(code, int)
    raise typer.Exit(code)


def _card_fields(card: str | None) -> list[str]:
    """Return what `--card` sets in the spec."""
    if card is None:
        return []
    return ["cluster.gpu_memory_gib=null", f"cluster.card={json.dumps(card)}"]


def _load(path: Path, overrides: Sequence[str] | None) -> JobSpec:
    from quantbatch.specfile import load_spec

    return load_spec(path, overrides or ())


@app.command()
def run(
    spec: SpecPath, overrides: Overrides = None, extend: Extend = False, as_json: AsJson = False
) -> None:
    """Run a job, or continue it: every row of the input is answered exactly once."""
    with _outcome(as_json):
        job = _load(spec, overrides)
        from quantbatch import pipeline

        with console.live_progress() as progress:
            report = pipeline.run(job, extend=extend, progress=progress)
        if as_json:
            console.say_document(report.to_json())
        else:
            console.say(f"{job.name}: {console.OUTCOMES[report.outcome.value]}", "bold")
            console.say(console.report_table(report))
            given = [str(spec), *(part for text in overrides or () for part in ("--set", text))]
            console.say(console.next_steps(report, shlex.join(given)))
        raise typer.Exit(report.exit_code)


@app.command()
def plan(  # noqa: PLR0913 - an argument for each option
    spec: Annotated[
        Path | None, typer.Argument(metavar="[SPEC]", help="The job's YAML file.")
    ] = None,
    card: OnCard = None,
    model: Annotated[
        str | None, typer.Option(help="Plan this model without a job: a folder or a repository.")
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Length of a prompt, with --model.")
    ] = 500,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Length of an answer, with --model.")
    ] = 200,
    overrides: Overrides = None,
    extend: Extend = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run would do, and whether the model fits the card. Writes nothing."""
    with _outcome(as_json):
        if (spec is None) == (model is None):
            problem = "plan takes the path of a SPEC, or --model"
            raise SpecError(JobError(problem, "quantbatch plan job.yaml --card L4"))
        if spec is not None:
            _plan_job(_load(spec, [*(overrides or ()), *_card_fields(card)]), extend, as_json)
        else:
            assert model is not None
            _plan_model(model, _card(card or ""), prompt_tokens, max_new_tokens, as_json)


def _plan_job(job: JobSpec, extend: bool, as_json: bool) -> None:
    from quantbatch import plan_tables
    from quantbatch.documents import describe_plan
    from quantbatch.forecast import look_ahead
    from quantbatch.preflight import examine

    found = examine(job, extend=extend)
    document = describe_plan(found, look_ahead(found))
    if not as_json:
        outcome = "does not fit" if found.misfit else console.OUTCOMES[document["outcome"]]
        console.say(f"{job.name}: {outcome}", "bold")
        console.say(plan_tables.plan_table(document))
        console.say("")
        _say_widths(document)
    _end_plan(document, found.misfit, as_json)


def _plan_model(
    name: str, card: Card | None, prompt_tokens: int, max_new_tokens: int, as_json: bool
) -> None:
    from quantbatch.documents import describe_model_plan
    from quantbatch.forecast import look_at_model
    from quantbatch.spec import Model

    found = look_at_model(
        Model(id=name), card, prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens
    )
    document = describe_model_plan(found)
    if not as_json:
        console.say(name, "bold")
        _say_widths(document)
    _end_plan(document, found.misfit, as_json)


def _end_plan(document: dict[str, Any], misfit: DoesNotFit | None, as_json: bool) -> None:
    """Complain of a model that does not fit, after the table that shows what would."""
    if misfit:
        console.complain(misfit)
        _leave(document | console.error_document(misfit), as_json)
    if as_json:
        console.say_document(document)


def _say_widths(document: Mapping[str, Any]) -> None:
    """Print the table of widths, and what to know."""
    from quantbatch import plan_tables

    if document["widths"]:
        console.say(plan_tables.widths_head(document))
        console.say(plan_tables.widths_table(document))
    for sentence in document["advice"]:
        console.say(f"note: {sentence}")


@app.command()
def validate(spec: SpecPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a spec, its model's files and the first rows of its input; print it resolved."""
    with _outcome(as_json):
        job = _load(spec, overrides)
        import yaml

        from quantbatch.preflight import settled
        from quantbatch.sample import check

        job = settled(job)
        _, head = check(job, 5)
        for row, error in head.errors.items():
            console.note(f"warning: {head.row_ids[row]} will be an error row: {error.message}")
        resolved = job.resolved().model_dump(mode="json")
        if as_json:
            console.say_document({"outcome": "ok", "exit_code": 0, "spec": resolved})
        else:
            console.say(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True).rstrip())
            console.say("ok", "bold green")


@app.command()
def sample(
    spec: SpecPath,
    count: Annotated[int, typer.Option("-n", min=1, max=1000, help="Rows to take.")] = 5,
    answers: Annotated[
        bool, typer.Option("--run/--no-run", help="Answer the rows, or only render them.")
    ] = True,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Render the first rows of a job and answer them in this process. Writes nothing."""
    with _outcome(as_json):
        job = _load(spec, overrides)
        from quantbatch import sample as sampling
        from quantbatch.preflight import settled

        job = settled(job)
        rows = sampling.sample(job, count)
        if answers:
            device = sampling.best_device(job)
            if device == "cpu" and job.engine.kind != "echo" and job.cluster.gpus_per_replica:
                console.note("there is no card here: the model runs on the CPU")
            rows = list(sampling.answer(job, rows, device=device, folder=Path.cwd()))
        _show_sample(rows, as_json=as_json)


def _show_sample(rows: Sequence[Sampled], *, as_json: bool) -> None:
    from quantbatch.documents import describe_sample

    if as_json:
        described = [describe_sample(row) for row in rows]
        console.say_document({"outcome": "sampled", "exit_code": 0, "rows": described})
        return
    for row in rows:
        console.say_sample(describe_sample(row))


@app.command()
def status(
    where: Annotated[str, typer.Argument(metavar="SPEC_OR_OUTPUT", help="A spec or an output.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show how far a job is, by the records on its output; needs neither model nor input."""
    with _outcome(as_json):
        from quantbatch.documents import describe_status

        document = describe_status(*_output(where, overrides))
        if as_json:
            console.say_document(document)
        else:
            console.say(console.status_table(document))


def _output(where: str, overrides: Sequence[str] | None) -> tuple[str, Storage]:
    from quantbatch.spec import Storage

    if where.endswith((".yaml", ".yml")) or Path(where).is_file():
        output = _load(Path(where), overrides).output
        return output.uri, output.storage
    return where, Storage()


@app.command()
def verify(spec: SpecPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Read input and output again and prove that every row is answered exactly once."""
    with _outcome(as_json):
        job = _load(spec, overrides)
        from quantbatch.verify import verify as verify_job

        verdict = verify_job(job)
        if as_json:
            console.say_document(verdict.to_json())
        else:
            console.say_verdict(verdict.to_json())
        raise typer.Exit(verdict.exit_code)


@app.command("compare")
def compare_widths(  # noqa: PLR0913 - an argument for each option
    spec: SpecPath,
    bits: Annotated[
        str,
        typer.Option(help="Widths: 4, 8, 16, 32, or names such as bf16, int8, nf4, nf4-nodq, fp4."),
    ] = "16,8,4",
    rows: Annotated[int, typer.Option(help="Rows to compare, spread over the input.")] = 300,
    reference: Annotated[
        str | None, typer.Option(help="The width to compare with; the first that fits if not said.")
    ] = None,
    gold: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Input column with the right answers.")
    ] = None,
    prompts: Annotated[
        bool, typer.Option("--prompts", help="Compare on the prompts' own tokens, too.")
    ] = False,
    on_cluster: Annotated[
        bool, typer.Option("--cluster", help="Run the models on the job's Ray cluster, not here.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report; out/compare/NAME if not said.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Run the same rows through several bit widths and tell what each costs in quality."""
    with _outcome(as_json):
        job = _load(spec, overrides)
        from quantbatch.compare.job import Choices, compare, compare_there

        choices = Choices(bits, rows, reference, gold, with_prompts=prompts)
        folder = out or Path("out/compare", job.name)
        run = compare_there if on_cluster else compare
        _show_comparison(run(job, choices, folder, console.note), folder, as_json=as_json)


def _show_comparison(document: dict[str, Any], folder: Path, *, as_json: bool) -> None:
    from quantbatch.compare import report

    if as_json:
        console.say_document(document)
    else:
        console.say(report.table(document))
        console.say(console.facts([*report.remarks(document), ("report", f"{folder}/index.html")]))


@app.command()
def prequantize(
    spec: SpecPath,
    on_cluster: Annotated[
        bool, typer.Option("--cluster", help="Quantize on the job's Ray cluster, not here.")
    ] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a job's model and keep it in model.cache, so that its replicas start sooner."""
    with _outcome(as_json):
        job = _load(spec, overrides)
        from quantbatch.prequantize import prequantize as fill_cache

        document = fill_cache(job, on_cluster=on_cluster, say=console.note)
        if as_json:
            console.say_document(document)
        else:
            console.say(f"{job.name}: {console.OUTCOMES[document['outcome']]}", "bold")
            console.say(console.cached_table(document))


@app.command()
def formats(
    card: Annotated[
        str, typer.Option(metavar="NAME", help="Card, such as L4; else that of this machine.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Show which checkpoints, quantized or not, this machine loads, and how."""
    with _outcome(as_json):
        from quantbatch.documents import describe_formats

        document = describe_formats(_card(card))
        if as_json:
            console.say_document(document)
        else:
            console.say(console.formats_table(document))
            for note in document["notes"]:
                console.say(note)


def _card(name: str) -> Card | None:
    """Return the card of a name, or without one this machine's first."""
    from quantbatch.model import cards, thiscard

    if not name:
        return next(iter(thiscard.local_cards()), None)
    try:
        return cards.find(name)
    except cards.UnknownCardError as error:
        raise SpecError(JobError(f"--card {error}")) from None


@app.command()
def schema() -> None:
    """Print the JSON schema of a spec, for editors."""
    console.say(_schema_text().rstrip("\n"))


def _schema_text() -> str:
    from quantbatch.spec import json_schema

    return json.dumps(json_schema(), indent=2) + "\n"


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("job.yaml"),
) -> None:
    """Write a commented spec to start from, and the schema by which editors complete it."""
    with _outcome(False):
        text = resources.files("quantbatch").joinpath("starter.yaml").read_text()
        try:
            with path.open("x") as file:
                file.write(text)
        except FileExistsError:
            raise Refused(f"{path} exists", "choose another name, or remove it") from None
        except OSError as error:
            raise Refused(f"{path}: {error.strerror}", "choose another place") from None
        beside = path.with_name(SCHEMA_NAME)
        if not beside.exists():
            beside.write_text(_schema_text())
        console.say(f"wrote {path} and {beside}")
        console.say(f"next: edit it, then quantbatch validate {path}")
