"""Deliberate bugs in the protocol, by which the simulator's suite is tested itself.

A mutant is a function of the product with a piece of its source replaced. The piece has to occur:
where the product's code changes, the mutant says so, and is never silently none.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest


class Mutation(NamedTuple):
    """A piece of a function's source, and what stands there instead."""

    where: str
    """Module and function, or class and method, such as `commits:commit_chunk`."""
    was: str
    now: str


MUTANTS: dict[str, list[Mutation]] = {
    "mark before data": [
        Mutation("commits:commit_chunk", "    store.put(data_key(chunk, attempt), data)\n", ""),
        Mutation(
            "commits:commit_chunk",
            "    if theirs.attempt != attempt:\n",
            "    store.put(data_key(chunk, attempt), data)\n    if theirs.attempt != attempt:\n",
        ),
    ],
    "overwrite instead of put-if-absent": [
        Mutation(
            "commits:commit_chunk",
            "theirs = record_of(Commit, store.claim(key, ours.to_bytes()))",
            "store.put(key, ours.to_bytes()); theirs = ours",
        )
    ],
    "412 means lost": [
        Mutation(
            "commits:commit_chunk",
            "theirs = record_of(Commit, store.claim(key, ours.to_bytes()))",
            "won = store.create(key, ours.to_bytes()); "
            "theirs = ours if won else ours._replace(attempt='of another')",
        )
    ],
    "412 means won": [
        Mutation(
            "commits:commit_chunk",
            "theirs = record_of(Commit, store.claim(key, ours.to_bytes()))",
            "store.create(key, ours.to_bytes()); theirs = ours",
        )
    ],
    "one name for all attempts": [
        Mutation("commits:commit_chunk", "attempt = uuid.uuid4().hex[:12]", "attempt = 'a' * 12")
    ],
    "no row-count law": [
        Mutation("commits:commit_chunk", "answered.num_rows == facts.rows", "True")
    ],
    "the etag is ignored": [
        Mutation("input.sources:_check_version", "if not piece.etag:", "if True:"),
        Mutation("preflight:_whole_plan", "f.etag != planned[f.name].etag", "False"),
    ],
    "a writer's error is swallowed": [
        Mutation(
            "commits:_put",
            "        store.put_file(key, path)\n",
            "        try:\n            store.put_file(key, path)\n"
            "        except Exception:\n            pass\n",
        )
    ],
    "published before all chunks are committed": [
        Mutation("ledger:Ledger._whole", "all(", "any("),
        Mutation(
            "commits:publish_shard",
            "    commits = [record_of(Commit, store.read(key)) for key in keys]\n",
            "    there = {info.key for info in store.list(f'{PRIVATE}/commits')}\n"
            "    commits = [record_of(Commit, store.read(key)) for key in keys if key in there]\n",
        ),
        Mutation(
            "commits:publish_shard", "sum(commit.rows for commit in commits) == shard.rows", "1"
        ),
        Mutation("commits:_write_parquet", "assert written == shard.rows", "assert written"),
    ],
    "the fingerprint is forgotten": [
        Mutation("job_record:refuse_other_job", "    if changed:\n", "    if False:\n")
    ],
    "published from the job's own attempts always": [
        Mutation("commits:publish_newest", "retries.newest(chunks)", "{}")
    ],
    "a late driver does not look again": [
        Mutation("commits:publish_newest", "begun(store) == retries.begun", "True"),
        Mutation("commits:publish_newest", "published.retry == last", "True"),
    ],
    "a late manifest stays": [
        Mutation("ledger:Ledger._is_newest", "begun(self.store) == self.retries.begun", "True")
    ],
    "success before the last file": [
        Mutation("ledger:Ledger.finished", "shard.id in self.published", "True"),
    ],
    "who loses removes the winner's file": [
        Mutation(
            "commits:commit_chunk",
            "store.delete(data_key(chunk, attempt))",
            "store.delete(data_key(chunk, theirs.attempt))",
        )
    ],
    "gc removes what no record names yet": [
        Mutation(
            "gc:_Records.named",
            "            return None\n        try:",
            "            return frozenset()\n        try:",
        )
    ],
    "a retry builds on nothing": [
        Mutation("retries:Retries.again", "self._base(chunk, self.known.index(retry))", "0")
    ],
}


@contextlib.contextmanager
def mutated(mutations: list[Mutation]) -> Iterator[None]:
    """Have the product with bugs in it.

    Raises:
        LookupError: A piece of source is not there.
    """
    sources: dict[str, str] = {}
    for where, was, now in mutations:
        source = sources.get(where) or inspect.getsource(_function(where))
        if source.count(was) < 1:
            raise LookupError(f"{where}: {was!r} is not in it any more: mend the mutant")
        sources[where] = source.replace(was, now)
    with pytest.MonkeyPatch.context() as patch:
        for where, source in sources.items():
            module_name, _, path = where.partition(":")
            module = importlib.import_module(f"quantbatch.{module_name}")
            made: dict[str, object] = {}
            exec(compile(textwrap.dedent(source), where, "exec"), module.__dict__, made)
            owner, _, name = path.rpartition(".")
            target = getattr(module, owner) if owner else module
            patch.setattr(target, name, made[name])
            for other in ("ledger", "pipeline", "stages"):
                if not owner and hasattr(importlib.import_module(f"quantbatch.{other}"), name):
                    patch.setattr(f"quantbatch.{other}.{name}", made[name])
        yield


def _function(where: str) -> Callable[..., object]:
    module_name, _, path = where.partition(":")
    found: Any = importlib.import_module(f"quantbatch.{module_name}")
    for name in path.split("."):
        found = inspect.getattr_static(found, name)
    if isinstance(found, property):
        found = found.fget
    function: Callable[..., object] = found
    return function
