"""Commands about a job: run it, and know of it before and after."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantbatch import console
from quantbatch.cli.common import (
    AsJson,
    Extend,
    OnCard,
    Overrides,
    SpecPath,
    card_fields,
    card_named,
    leave,
    load,
    outcome,
    output_of,
)
from quantbatch.draining import signals_wait, stoppable
from quantbatch.errors import JobError, SpecError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from quantbatch.batchfile.onefile import OneFile
    from quantbatch.errors import DoesNotFit
    from quantbatch.model.cards import Card
    from quantbatch.sample import Sampled
    from quantbatch.spec import JobSpec


def run(  # noqa: PLR0913 - an argument for each option
    spec: Annotated[
        Path | None, typer.Argument(metavar="[SPEC]", help="The job's YAML file.")
    ] = None,
    openai_batch: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Answer a batch file of requests, without a spec."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="With it: where the responses go."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="With it: the model, a folder or a repository.")
    ] = None,
    bits: Annotated[
        str | None, typer.Option(help="With it: 4, 8, 16, 32, or auto for what fits the card.")
    ] = None,
    card: OnCard = None,
    overrides: Overrides = None,
    extend: Extend = False,
    as_json: AsJson = False,
) -> None:
    """Run a job, or continue it: every row of the input is answered exactly once."""
    with outcome(as_json), stoppable():
        overrides = [*card_fields(card), *(overrides or ())]
        whole = None
        if openai_batch is not None:
            whole = _one_file(spec, openai_batch, output, model, bits)
            spec = whole.spec
        elif spec is None or output or model or bits:
            problem = "run takes the path of a SPEC, or --openai-batch with --output and --model"
            raise SpecError(JobError(problem, "quantbatch run job.yaml"))
        job = load(spec, overrides)
        with signals_wait():
            from quantbatch import pipeline

        with console.live_progress() as progress:
            report = pipeline.run(job, extend=extend, progress=progress)
        if whole:
            _finish(whole)
        if as_json:
            console.say_document(report.to_json())
        else:
            console.say(f"{job.name}: {console.OUTCOMES[report.outcome.value]}", "bold")
            console.say(console.report_table(report))
            given = [str(spec), *(part for text in overrides or () for part in ("--set", text))]
            if whole is None or not report.exit_code:
                console.say(console.next_steps(report, shlex.join(given)))
        raise typer.Exit(report.exit_code)


def _one_file(
    spec: Path | None, requests: Path, output: Path | None, model: str | None, bits: str | None
) -> OneFile:
    from quantbatch.batchfile import onefile

    if spec is not None or output is None or model is None:
        problem = "--openai-batch takes --output and --model, and no SPEC"
        hint = "quantbatch run --openai-batch in.jsonl -o out.jsonl --model MODEL --bits 4"
        raise SpecError(JobError(problem, hint))
    number = int(bits) if bits and bits.isdecimal() else bits
    return onefile.begin(requests, output, model=model, bits=number)


def _finish(job: OneFile) -> None:
    from quantbatch.batchfile import onefile

    onefile.finish(job)
    failed = f", failed requests: {job.errors}" if job.errors.exists() else ""
    console.note(f"responses: {job.output}{failed}")


def plan(  # noqa: PLR0913 - an argument for each option
    spec: Annotated[
        Path | None, typer.Argument(metavar="[SPEC]", help="The job's YAML file.")
    ] = None,
    card: OnCard = None,
    model: Annotated[
        str | None, typer.Option(help="Plan this model without a job: a folder or a repository.")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of a prompt, with --model; 500 if not said.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Length of an answer, with --model; 200 if not said.")
    ] = None,
    overrides: Overrides = None,
    extend: Extend = False,
    as_json: AsJson = False,
) -> None:
    """Show what a run would do, and whether the model fits the card. Writes nothing."""
    with outcome(as_json):
        if (spec is None) == (model is None):
            problem = "plan takes the path of a SPEC, or --model"
            raise SpecError(JobError(problem, "quantbatch plan job.yaml --card L4"))
        lengths = {"--prompt-tokens": prompt_tokens, "--max-new-tokens": max_new_tokens}
        if spec is not None:
            _refuse_options("--model", lengths)
            _plan_job(load(spec, [*(overrides or ()), *card_fields(card)]), extend, as_json)
        else:
            assert model is not None
            _refuse_options("a SPEC", {"--set": overrides, "--extend": extend})
            found = card_named(card or "")
            _plan_model(model, found, prompt_tokens or 500, max_new_tokens or 200, as_json)


def _refuse_options(goes_with: str, options: Mapping[str, object]) -> None:
    """Refuse options that would say nothing here."""
    for name, value in options.items():
        if value:
            hint = f"leave out {name}, or give {goes_with} instead"
            raise SpecError(JobError(f"{name} goes with {goes_with} only", hint))


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
    from quantbatch.places import without_credentials
    from quantbatch.spec import Model

    try:
        model = Model(id=without_credentials(name))
    except ValueError as error:
        raise SpecError(JobError(f"--model: {error}")) from None
    found = look_at_model(model, card, prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens)
    document = describe_model_plan(found)
    if not as_json:
        console.say(name, "bold")
        _say_widths(document)
    _end_plan(document, found.misfit, as_json)


def _end_plan(document: dict[str, Any], misfit: DoesNotFit | None, as_json: bool) -> None:
    """Complain of a model that does not fit, after the table that shows what would."""
    if misfit:
        console.complain(misfit)
        leave(document | console.error_document(misfit), as_json)
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


def validate(spec: SpecPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check a spec, its model's files and the first rows of its input; print it resolved."""
    with outcome(as_json):
        job = load(spec, overrides)
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
    with outcome(as_json):
        job = load(spec, overrides)
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


def status(
    where: Annotated[str, typer.Argument(metavar="SPEC_OR_OUTPUT", help="A spec or an output.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show how far a job is, by the records on its output; needs neither model nor input."""
    with outcome(as_json):
        from quantbatch.documents import describe_status

        document = describe_status(*output_of(where, overrides))
        if as_json:
            console.say_document(document)
        else:
            console.say(console.status_table(document))


def verify(
    spec: SpecPath,
    prompts: Annotated[
        bool,
        typer.Option("--prompts", help="Render every prompt again, and compare; needs the model."),
    ] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Read input and output again and prove that every row is answered exactly once."""
    with outcome(as_json):
        job = load(spec, overrides)
        from quantbatch.verify import verify as verify_job

        verdict = verify_job(job, prompts=prompts)
        if as_json:
            console.say_document(verdict.to_json())
        else:
            console.say_verdict(verdict.to_json())
        raise typer.Exit(verdict.exit_code)


def gc(
    where: Annotated[str, typer.Argument(metavar="SPEC_OR_OUTPUT", help="A spec or an output.")],
    older_than: Annotated[
        str,
        typer.Option(metavar="AGE", help="Of what goes by age, by the store's clock: 90m, 7d."),
    ] = "24h",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go.")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Remove what killed runs left on an output, also while others run; never what counts.

    Data files of attempts that lost go at once. Scratch files, leases and unfinished uploads go by
    their age.
    """
    with outcome(as_json):
        from quantbatch import gc as tidying

        age_s = tidying.age_s(older_than)
        place = output_of(where, overrides)
        document = tidying.tidy(*place, older_than_s=age_s, dry_run=dry_run).to_json()
        if as_json:
            console.say_document(document)
        else:
            console.say_tidied(document)


COMMANDS: dict[str, Callable[..., None]] = {
    "run": run,
    "plan": plan,
    "validate": validate,
    "sample": sample,
    "status": status,
    "verify": verify,
    "gc": gc,
}
"""By name."""
