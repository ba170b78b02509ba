"""The cache's records on a local disk, with a pretended model: who wins, what readers see."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest
from typing_extensions import override

from quantbatch.errors import ModelError, StorageError
from quantbatch.spec import FourBit, Int8, Model, Storage, Unquantized
from quantbatch.storage import open_store
from quantbatch.weights import cache as cache_module
from quantbatch.weights import copies, node
from quantbatch.weights.cache import WeightCache
from quantbatch.weights.identity import identity
from tests.unit.test_ledger import FailingStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from quantbatch.model.checkpoint import Checkpoint
    from quantbatch.storage import Store


class PretendedModel:
    """Writes two files of text for weights."""

    def __init__(self, text: str) -> None:
        self.text = text

    def save_pretrained(self, folder: Path, *, max_shard_size: int) -> None:
        assert max_shard_size == cache_module.FILE_BYTES
        for name in ("a", "b"):
            Path(folder, f"{name}.safetensors").write_text(f"{name}: {self.text}")


def clock_of(days: int) -> type[datetime]:
    """Return a datetime by which it is some days ago."""
    then = datetime.now(UTC) - timedelta(days=days)
    return type("Clock", (datetime,), {"now": staticmethod(lambda _: then)})


class PretendedCheckpoint:
    id, digest, quantized = "m", "digest", None


CHECKPOINT = cast("Checkpoint", PretendedCheckpoint())
MODEL = Model(id="m", quantization=FourBit(), dtype="bfloat16")


@pytest.fixture(autouse=True)
def node_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return node.node_folder("weights")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "cache"), Storage())


def cache_in(store: Store, model: Model = MODEL) -> WeightCache:
    return WeightCache(store, identity(CHECKPOINT, model, "cpu"))


def load(cache: WeightCache) -> Any:
    def load_from(folder: Path) -> Any:
        return "; ".join(path.read_text() for path in sorted(folder.glob("*.safetensors")))

    return cache.load(load_from)


def put(cache: WeightCache, text: str, version: int = 1) -> bool:
    return cache.put(cast("Any", PretendedModel(text)), version).ours


def files_of(cache: WeightCache) -> list[Path]:
    return sorted(Path(cache.store.uri, cache.key).glob("*/*.safetensors"))


# ---- the key


CHANGES: dict[str, Model] = {
    "kind": Model(id="m", quantization=FourBit(kind="fp4"), dtype="bfloat16"),
    "int8": Model(id="m", quantization=Int8(), dtype="bfloat16"),
    "double_quant": Model(id="m", quantization=FourBit(double_quant=False), dtype="bfloat16"),
    "storage_dtype": Model(
        id="m", quantization=FourBit(storage_dtype="bfloat16"), dtype="bfloat16"
    ),
    "skip_modules": Model(id="m", quantization=FourBit(skip_modules=["q"]), dtype="bfloat16"),
    "dtype": Model(id="m", quantization=FourBit(), dtype="float16"),
}


def key_of(model: Model, device: str = "cpu", checkpoint: Checkpoint = CHECKPOINT) -> str:
    return WeightCache(open_store("/", Storage()), identity(checkpoint, model, device)).key


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_bytes_changes_the_key(change: str) -> None:
    assert key_of(CHANGES[change]) != key_of(MODEL)


def test_device_model_and_versions_change_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    other: Any = PretendedCheckpoint()
    other.digest = "another"
    keys = {key_of(MODEL), key_of(MODEL, "cuda"), key_of(MODEL, checkpoint=other)}
    for package in ("bitsandbytes", "transformers", "torch"):
        monkeypatch.setattr(metadata, "version", lambda name, new=package: f"{name == new}")
        keys.add(key_of(MODEL))
    assert len(keys) == 6


def test_what_changes_no_bytes_changes_no_key() -> None:
    same = Model(
        id="elsewhere", quantization=FourBit(compute_dtype="float32"), dtype="bfloat16", cache="x"
    )
    assert key_of(same) == key_of(MODEL)
    assert key_of(MODEL, "cuda:0") == key_of(MODEL, "cuda:1")
    orders = (["a", "b"], ["b", "a", "b"])
    skipping = [Model(id="m", quantization=Int8(skip_modules=o, threshold=len(o))) for o in orders]
    assert len({key_of(model) for model in skipping}) == 1


@pytest.mark.parametrize("quantized", [None, "bitsandbytes"])
def test_what_is_not_quantized_here_is_not_cached(
    quantized: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint: Any = PretendedCheckpoint()
    checkpoint.quantized = quantized
    quantization = FourBit() if quantized else Unquantized()
    model = Model(id="m", quantization=quantization, cache="somewhere")
    with caplog.at_level("INFO"):
        assert WeightCache.of(checkpoint, model, "cpu") is None
    (said,) = caplog.messages
    assert "quantized already" in said if quantized else "without quantizing" in said


def test_a_cache_nowhere_is_an_error() -> None:
    model = MODEL.model_copy(update={"cache": "gopher://x"})
    with pytest.raises(StorageError, match="no store is known for gopher"):
        WeightCache.of(CHECKPOINT, model, "cpu")


# ---- records


def test_what_is_put_is_loaded(store: Store) -> None:
    cache = cache_in(store)
    assert load(cache) == (None, 1)
    assert put(cache, "x")
    assert load(cache) == ("a: x; b: x", None)
    record = json.loads(store.read(f"{cache.key}/record-000001.json"))
    assert record["of"] == cache.document
    assert sorted(file["name"] for file in record["files"]) == ["a.safetensors", "b.safetensors"]
    assert load(cache_in(store, CHANGES["kind"])) == (None, 1)


def test_files_may_be_read_by_those_who_may_look_into_the_folder(store: Store) -> None:
    class Secretive(PretendedModel):
        @override
        def save_pretrained(self, folder: Path, *, max_shard_size: int) -> None:
            super().save_pretrained(folder, max_shard_size=max_shard_size)
            Path(folder, "a.safetensors").chmod(0o600)

    cache = cache_in(store)
    cache.put(cast("Any", Secretive("x")), 1)
    modes = {path.stat().st_mode & 0o777 for path in files_of(cache)}
    assert modes == {path.parent.stat().st_mode & 0o666 for path in files_of(cache)}


def test_the_first_of_two_writers_counts_and_the_other_leaves_nothing(store: Store) -> None:
    cache = cache_in(store)
    assert put(cache, "first")
    assert not put(cache, "second")
    assert load(cache).model == "a: first; b: first"
    assert len(files_of(cache)) == 2


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_damage_is_noticed_and_made_good(
    store: Store, damage: Callable[[Path], None], elsewhere: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_in(FailingStore(store, -1, after=False) if elsewhere else store)
    put(cache, "x")
    damage(files_of(cache)[1])
    assert load(cache) == (None, 2)
    (warning,) = caplog.messages
    assert "is damaged and made again: " in warning
    assert elsewhere or "b.safetensors" in warning
    assert put(cache, "y", 2)
    assert load(cache) == ("a: y; b: y", None)
    assert not put(cache, "too late", 2)
    assert load(cache).model == "a: y; b: y"


@pytest.mark.parametrize(
    "content", [b"", b"{}", b'{"version": 1, "attempt": "../x", "files": []}', b"[1]"]
)
def test_a_damaged_record_is_made_good(store: Store, content: bytes) -> None:
    cache = cache_in(store)
    put(cache, "x")
    store.put(f"{cache.key}/record-000001.json", content)
    assert load(cache) == (None, 2)
    put(cache, "y", 2)
    assert load(cache).model == "a: y; b: y"


@pytest.mark.parametrize("change", [{"version": 2}, {"of": {"format": 2}}, {"of": None}])
def test_a_record_of_another_version_is_made_good(store: Store, change: dict[str, Any]) -> None:
    cache = cache_in(store)
    put(cache, "x")
    key = f"{cache.key}/record-000001.json"
    store.put(key, json.dumps(json.loads(store.read(key)) | change).encode())
    assert load(cache) == (None, 2)
    put(cache, "y", 2)
    assert load(cache).model == "a: y; b: y"


def test_a_reader_goes_on_while_the_entry_is_made_again(store: Store) -> None:
    cache = cache_in(store)
    put(cache, "x")
    with cache.whole() as (record, folder):
        assert record.version == 1
        flip(files_of(cache)[1])
        put(cache_in(store), "y", 2)
        assert (folder / "a.safetensors").read_text() == "a: x"
    assert load(cache).model == "a: y; b: y"


def test_a_reader_that_comes_upon_damage_looks_for_a_newer_version(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_in(store)
    put(cache, "x")
    real = copies.check

    def check(folder: Path, files: Any) -> None:
        monkeypatch.setattr(copies, "check", real)
        shutil.rmtree(folder)
        put(cache_in(store), "y", 2)
        real(folder, files)

    monkeypatch.setattr(copies, "check", check)
    assert load(cache) == ("a: y; b: y", None)
    assert caplog.messages == []


def test_what_does_not_count_is_removed_after_a_week(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_in(store)
    old = datetime.now(UTC) - timedelta(days=8)
    for name in ("left", "in-use"):
        store.put(f"{cache.key}/{old.strftime('%Y%m%dT%H%M%SZ')}-{name}/f", b"")
    store.put(f"{cache.key}/mine/f", b"")
    put(cache, "x")
    left = {path.parent.name for path in Path(store.uri, cache.key).glob("*/f")}
    assert left == {"mine"}
    assert load(cache).model == "a: x; b: x"


def test_readers_of_an_old_entry_have_a_week_from_when_it_was_replaced(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_in(store)
    for version, days in ((1, 30), (2, 20), (3, 0)):
        with monkeypatch.context() as then:
            then.setattr(cache_module, "datetime", clock_of(days))
            put(cache, str(version), version)
    left = {path.parent.name for path in Path(store.uri, cache.key).glob("*/*.safetensors")}
    versions = {cache._record(version).attempt: version for version in (1, 2, 3)}
    assert {versions[attempt] for attempt in left} == {2, 3}


def test_an_entry_of_no_use_is_left_as_it_is(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_in(store)
    put(cache, "x")

    def fail(_: Path) -> Any:
        raise ModelError("m lacks lm_head.weight")

    assert cache.load(fail) == (None, None)
    assert "of no use, going on without: m lacks lm_head.weight" in caplog.text


# ---- a store that fails


@pytest.mark.parametrize("after", [False, True])
def test_a_failure_at_any_store_call_breaks_nothing(tmp_path: Path, after: bool) -> None:
    """Fail the first, the second, ... call of a job that fills the cache, then look at it."""
    fail_at = 0
    while True:
        fail_at += 1
        inner = open_store(str(tmp_path / str(fail_at)), Storage())
        failing = FailingStore(inner, fail_at, after=after)
        first = cache_in(failing)
        found = load(first)
        if found.version:
            first.keep(cast("Any", PretendedModel("first")), found.version)
        cache = cache_in(inner)
        found = load(cache)
        if found.model is None:
            assert found.version
            cache.keep(cast("Any", PretendedModel("second")), found.version)
            found = load(cache)
        assert found.model in ("a: first; b: first", "a: second; b: second")
        if failing.calls < fail_at:
            assert found.model == "a: first; b: first"
            break
    assert fail_at > 6
    print(f"store calls failed: {fail_at - 1}, after the effect: {after}")


@pytest.mark.parametrize("after", [False, True])
def test_what_is_settled_counts_though_tidying_up_fails(store: Store, after: bool) -> None:
    claim = 3  # after the two files
    for fail_at in (claim + 1, claim + 2, claim + 3):
        failing = FailingStore(store, fail_at, after=after)
        version = fail_at - claim
        assert cache_in(failing).put(cast("Any", PretendedModel("x")), version).ours
        assert failing.calls >= fail_at


def test_what_a_failed_writer_left_is_removed(store: Store) -> None:
    failing = FailingStore(store, 2, after=False)
    with pytest.raises(StorageError, match="injected"):
        put(cache_in(failing), "x")
    assert failing.calls > 2
    assert files_of(cache_in(store)) == []


@pytest.mark.parametrize("where", ["/proc/nowhere", "/dev/null/x"])
def test_a_cache_that_can_t_be_written_is_a_warning(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_in(open_store(where, Storage()))
    found = load(cache)
    if found.version:
        cache.keep(cast("Any", PretendedModel("x")), found.version)
    (warning,) = caplog.messages
    assert "can't be stored in model.cache" in warning or "can't be read, going on" in warning


def test_a_model_that_can_t_be_saved_is_a_warning(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    class Unsavable(PretendedModel):
        @override
        def save_pretrained(self, folder: Path, *, max_shard_size: int) -> None:
            super().save_pretrained(folder, max_shard_size=max_shard_size)
            raise OSError(28, "No space left on device")

    cache = cache_in(store)
    assert cache.is_filled_here
    cache.keep(cast("Any", Unsavable("x")), 1)
    assert "No space left" in caplog.text
    assert not cache.is_filled_here, "the other replicas don't wait for that"
    hour_ago = time.time() - 3601
    os.utime(node.node_folder("turns") / f"{cache.key}.failed", (hour_ago, hour_ago))
    assert cache.is_filled_here
    assert files_of(cache) == []
    assert load(cache) == (None, 1)


def test_one_replica_of_a_node_stores(store: Store) -> None:
    cache = cache_in(store)
    lock = node.node_folder("turns") / f"{cache.key}.store"
    with node.locked(lock):
        cache.keep(cast("Any", PretendedModel("x")), 1)
    assert load(cache) == (None, 1)
    cache.keep(cast("Any", PretendedModel("x")), 1)
    assert load(cache).model


def test_what_is_stored_already_is_not_stored_again(store: Store) -> None:
    cache = cache_in(store)
    put(cache, "first")

    class Forbidden(PretendedModel):
        @override
        def save_pretrained(self, folder: Path, *, max_shard_size: int) -> None:
            raise AssertionError("saved")

    cache.keep(cast("Any", Forbidden("second")), 1)
    assert load(cache).model == "a: first; b: first"


def test_files_are_those_of_the_newest_record(store: Store) -> None:
    cache = cache_in(store)
    assert cache.files() == []
    store.put(f"{cache.key}/20300101T000000Z-x/a.safetensors", b"of an attempt under way")
    assert cache.files() == []
    for version, text in enumerate(["x", "y"], start=1):
        put(cache, text, version)
    assert [path.read_text() for path in cache.files()] == ["a: y", "b: y"]
    store.put(f"{cache.key}/record-000003.json", b"damaged")
    assert cache.files() == []


def test_where_replicas_wait_for_the_first_to_fill_the_cache(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_in(store).is_filled_here
    put(cache_in(store), "x")
    assert cache_in(store).is_filled_here
    assert not cache_in(open_store("s3://bucket/weights", Storage())).is_filled_here
    monkeypatch.setattr(os, "access", lambda path, mode: not (path.exists() and mode == os.W_OK))
    assert not cache_in(store).is_filled_here


# ---- copies on this node


def test_a_remote_entry_is_fetched_once(store: Store, node_folder: Path) -> None:
    put(cache_in(store), "x")
    remote = FailingStore(store, -1, after=False)
    assert load(cache_in(remote)).model == "a: x; b: x"
    fetching = remote.calls
    remote.calls = 0
    assert load(cache_in(remote)).model == "a: x; b: x"
    assert remote.calls == fetching - 2, "the two files were not opened again"
    (copy,) = [path for path in node_folder.iterdir() if path.is_dir()]
    assert cache_in(remote).files() == sorted(copy.iterdir())


def test_a_damaged_copy_is_fetched_again(
    store: Store, node_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(cache_in(store), "x")
    remote = FailingStore(store, -1, after=False)
    load(cache_in(remote))
    (copy,) = [path for path in node_folder.iterdir() if path.is_dir()]
    flip(copy / "a.safetensors")
    assert load(cache_in(remote)).model == "a: x; b: x"
    (warning,) = caplog.messages
    assert "is damaged: it is fetched again" in warning


def test_a_half_fetched_copy_is_never_used(store: Store, node_folder: Path) -> None:
    cache = cache_in(store)
    put(cache, "x")
    with cache.whole() as (record, _):
        name = f"{cache.key[:16]}-{record.attempt}"
    (node_folder / f"{name}.part").mkdir()
    (node_folder / f"{name}.part" / "a.safetensors").write_text("a: ")
    assert load(cache_in(FailingStore(store, -1, after=False))).model == "a: x; b: x"
    assert [path.name for path in node_folder.iterdir() if path.is_dir()] == [name]


class Disk:
    """A disk of 1,000 bytes, of which what lies in a folder is taken."""

    def __init__(self, folder: Path, total: int = 1000) -> None:
        self.folder, self.total = folder, total

    @property
    def free(self) -> int:
        return self.total - sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())


def test_old_copies_make_room_but_for_those_in_use(
    node_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for age, name in enumerate(["oldest", "old", "new"]):
        (node_folder / name).mkdir()
        (node_folder / name / "f").write_bytes(b"x" * 200)
        os.utime(node_folder / name, (1000 + age, 1000 + age))
    monkeypatch.setattr(shutil, "disk_usage", Disk)
    copies.make_room(node_folder, 350)
    assert len(list(node_folder.glob("*/f"))) == 3
    with node.locked(node_folder / "oldest.lock", shared=True):
        copies.make_room(node_folder, 360)
    assert {path.parent.name for path in node_folder.glob("*/f")} == {"oldest", "new"}
    with pytest.raises(StorageError, match="no room for"):
        copies.make_room(node_folder, 960)
    assert list(node_folder.glob("*/f")) == []


def test_no_room_is_a_warning(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(cache_in(store), "x")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Disk(folder, total=7))
    assert load(cache_in(FailingStore(store, -1, after=False))) == (None, None)
    assert "no room for" in caplog.text


# ---- the node's folder


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path: Path) -> None:
    root = node.node_folder("weights").parent
    root.chmod(0o777)
    with pytest.raises(StorageError, match="open to other users"):
        node.node_folder("weights")
    shutil.rmtree(root)
    root.symlink_to(tmp_path)
    with pytest.raises(StorageError, match="open to other users"):
        node.node_folder("weights")


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from quantbatch.weights.node import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout
    assert holder.stdout.readline() == b"held\n"
    with node.locked(path, wait=False) as ours:
        assert not ours
    with node.locked(path, shared=True, wait=False) as ours:
        assert not ours
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with node.locked(path, wait=False) as ours:
        assert ours


def test_documents_are_what_keys_stand_for() -> None:
    cache = WeightCache(open_store("/", Storage()), {"b": 1, "a": 2})
    same = dataclasses.replace(cache, document={"a": 2, "b": 1})
    assert (
        cache.key
        == same.key
        == ("d3626ac30a87e6f7a6428233b3c68299976865fa5508e4267c5415c76af7a772")
    )
