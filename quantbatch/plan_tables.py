"""How `plan` is shown: what a run would do, and a model in every width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from quantbatch.console import facts, several, size, unreadable_lines

if TYPE_CHECKING:
    from collections.abc import Mapping


def plan_table(document: Mapping[str, Any]) -> Table:
    """Return what `documents.describe_plan` describes."""
    source, memory = document["input"], document["memory"]
    prompt, output = document["prompt"], document["output"]
    done, chunks = document["done"], document["chunks"]
    each = f"{several(chunks['count'], 'chunk')} of up to {several(chunks['rows_each'], 'row')}"
    rows_in, files_in = several(source["rows"], "row"), several(source["files"], "file")
    rows = [
        ("input", f"{source['uri']}: {rows_in} in {files_in}"),
        *unreadable_lines(source["unreadable"]),
        ("work", f"{each} -> {several(output['files'], 'file')}"),
        ("done", _done(done, source["rows"])),
        ("model", document["model"]),
        ("prompt", f"at most {prompt['max_input_tokens']:,} tokens, {prompt['beyond']}"),
        *_lengths(prompt, source["rows"]),
        ("answer", f"at most {prompt['max_new_tokens']:,} tokens"),
        *_memory(memory, document["card"], fits_not=document["does_not_fit"]),
        ("output", output["uri"]),
        ("columns", ", ".join(f"{c['name']} {c['type']}" for c in output["columns"])),
    ]
    if source["new_files"]:
        rows.insert(1, ("new files", f"{source['new_files']:,} since the job was planned"))
    return facts(rows)


def _done(done: Mapping[str, int], rows: int) -> str:
    if not done["rows"]:
        return "nothing: the output is new"
    published = several(done["files"], "file")
    return f"{done['rows']:,} of {several(rows, 'row')}, {published} published"


def _lengths(prompt: Mapping[str, Any], total: int) -> list[tuple[str, str]]:
    """Say how long the sampled prompts are, and what that means for all rows."""
    sample, rows = prompt["sample"], prompt["sample"]["rows"]
    if not rows:
        return [("", "no row could be sampled")]
    lines = [("", _quantiles(sample, whole=rows >= total))]
    too_long = _expected(sample["too_long"], sample["too_long_expected"], sample, total)
    lines.append(("too long", too_long))
    if sample["errors"]:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in sample["errors"].items())
        count = sum(sample["errors"].values())
        expected = _expected(count, sample["errors_expected"], sample, total)
        lines.append(("errors", f"{expected} ({kinds})"))
    return lines


def _quantiles(sample: Mapping[str, Any], *, whole: bool) -> str:
    if not sample["max_tokens"]:
        return f"none of {several(sample['rows'], 'sampled row')} has a prompt"
    longest = f"{sample['max_tokens']:,}"
    if sample["max_tokens"] > sample["counted_to_tokens"]:
        longest = f"more than {sample['counted_to_tokens']:,}"
    return (
        f"half of {several(sample['rows'], 'sampled row')} have up to {sample['p50_tokens']:,}"
        f" tokens, 95 % up to {sample['p95_tokens']:,}, the longest {longest};"
        f" {'' if whole else 'about '}{sample['input_tokens']:,} tokens in all"
    )


def _expected(count: int, expected: int, sample: Mapping[str, Any], total: int) -> str:
    """Say how many of all rows are like some of the sample; none seen is not none at all."""
    rows = sample["rows"]
    if rows >= total:
        return several(count, "row") if count else "none"
    if count:
        return f"about {several(expected, 'row')}: {count:,} of {rows:,} sampled"
    most = sample["unseen_at_most"]
    return f"none of {rows:,} sampled, so at most {most:,} of {total:,} with 95 % certainty"


def widths_table(document: Mapping[str, Any]) -> Table:
    """Return what `documents.describe_width` describes, in 80 columns: weights, bits a parameter,
    change against 32 and 16 bits, workspace, context with reserve, tokens of cache left, rows at
    once. Sizes are in GiB.
    """
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    table.add_column("kind")
    heads = ["weights", "bits", "vs 32", "vs 16", "work", "other", "KV left", "rows"]
    for head in heads:
        table.add_column(head, justify="right")
    table.add_column("fits", no_wrap=True)
    for width in document["widths"]:
        mark = " <-" if width["chosen"] else ""
        left = "-" if not width["kv_tokens"] else f"{width['kv_tokens']:,}"
        table.add_row(
            width["kind"],
            f"{width['weight_bytes'] / 2**30:.2f}",
            f"{width['bits_per_param']:.2f}",
            *(_change(width[f"saved_of_{bits}_bits"]) for bits in (32, 16)),
            *(f"{width[name] / 2**30:.2f}" for name in ("workspace_bytes", "overhead_bytes")),
            left,
            "-" if not width["rows"] else f"{width['rows']:,}",
            f"{width['verdict'] or '?'}{mark}",
        )
    return table


def _change(saved: float) -> str:
    return f"{-saved:+.1%}" if abs(saved) >= 0.0005 else "="


def widths_head(document: Mapping[str, Any]) -> str:
    """Say what the table of widths is of: parameters, what stays in 16 bits, card, row length."""
    widths, card = document["widths"], document["card"]
    params = widths[0]["params"]
    quantized = max(width["quantized_params"] for width in widths)
    parts = [f"{params / 1e9:,.3f} B parameters"]
    if quantized:
        kept = 1 - quantized / params
        parts[0] += f" ({quantized / 1e9:,.3f} B quantizable, {kept:.1%} stay as they are)"
    if card:
        parts.append(f"{_card(card)}: {size(card['memory_bytes'])}")
    parts += [_cache(widths[-1]), f"rows of {document['row_tokens']:,} tokens"]
    parts.append("sizes in GiB, <- is chosen")
    return "; ".join(parts)


def _card(card: Mapping[str, Any]) -> str:
    """Name the cards of a replica."""
    if card["count"] == 1:
        return card["name"] or "a card"
    return f"{card['count']} x {card['name'] or 'a card'}"


def _cache(width: Mapping[str, Any]) -> str:
    """Say what a token takes of the cache, and what stops growing."""
    growing, sliding = width["growing_bytes_per_token"], width["sliding_bytes_per_token"]
    said = f"KV cache {(growing + sliding) / 1024:g} KiB a token"
    if sliding:
        said += f", {growing / 1024:g} beyond {width['window_tokens']:,}"
    if width["fixed_bytes_per_row"]:
        said += f", and {size(width['fixed_bytes_per_row'])} a row"
    return said


def _memory(
    memory: Mapping[str, Any] | None, card: Mapping[str, Any] | None, *, fits_not: bool
) -> list[tuple[str, str]]:
    if memory is None:
        return [("memory", "does not fit" if fits_not else "this engine loads no model")]
    parts = ("weights", "kv", "workspace", "overhead", "reserve")
    sizes = [f"{name} {size(memory[f'{name}_bytes'])}" for name in parts]
    per_token = f"{memory['kv_bytes_per_token'] / 1024:g} KiB a token"
    verdict = "no verdict, since cluster.card is not set: each replica asks its device"
    if memory["fits"]:
        assert card is not None
        verdict = f"fits the {size(memory['device_bytes'])} of {_card(card)}"
    at_once = f"at most {several(memory['batch_size'], 'row')} at once"
    if memory["step_tokens"]:
        at_once += f", {memory['step_tokens']:,} tokens a step"
    lines = [
        ("memory", f"{size(memory['total_bytes'])} = {' + '.join(sizes)}"),
        ("", f"KV cache {per_token}, room for {memory['kv_tokens']:,} tokens; {at_once}"),
        ("", verdict),
    ]
    if memory["card_layers"]:
        layers = " + ".join(map(str, memory["card_layers"]))
        lines.append(("", f"layers on each card: {layers}"))
    if memory["static_because"]:
        lines.append(("engine", f"static, which is slower: {memory['static_because']}"))
    return lines
