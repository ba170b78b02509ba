"""S3 in trouble: each kind of it on each call, once and on and on; outages; what is no trouble that
passes; and claims whose answers get lost."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quantbatch.errors import StorageError
from quantbatch.storage import S3Store, probe, s3
from quantbatch.storage.patience import Patience
from tests.faults.proxy import QUICK, FaultProxy, Operation
from tests.integration.claims import contended
from tests.integration.support import COMMAND, proven, run_to_the_end, write_spec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.conftest import Count
    from tests.faults.proxy import Kind
    from tests.integration.support import Bucket, Head

SEED = int(os.environ.get("QUANTBATCH_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 10**6)
TIMED: list[Kind] = ["hang", "hang_after", "slow"]
"""These cost a test as long as a call is waited for."""
SWIFT = Patience(first_wait_s=0.01)
HASTY = Patience(first_wait_s=0.01, answer_s=0.7, complete_s=0.7, slowest_bytes_per_s=1e6)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upload in parts what is larger than 4,000 bytes."""
    monkeypatch.setattr(s3, "PART_BYTES", 2000)


@pytest.fixture
def store(faulty_bucket: Bucket) -> S3Store:
    uri = f"{faulty_bucket.uri}/out"
    return S3Store(uri, faulty_bucket.storage, known=True, patience=SWIFT)


@pytest.fixture
def hasty(store: S3Store) -> S3Store:
    """The same, which soon has waited long enough for an answer."""
    return replace(store, patience=HASTY)


def _file(folder: Path, data: bytes) -> Path:
    path = folder / uuid.uuid4().hex
    path.write_bytes(data)
    return path


def _uploads(bucket: Bucket) -> list[Any]:
    """Return the uploads that are neither complete nor aborted, asking the server itself."""
    fs = bucket.store("out")._fs
    return list(fs.list_multipart_uploads(bucket.uri.removeprefix("s3://")))


def get(store: S3Store, at: str, folder: Path) -> None:
    data = os.urandom(3000)
    store.put(f"{at}/whole", data)
    assert store.read(f"{at}/whole") == data
    with store.open(f"{at}/whole") as file:
        file.seek(1000)
        assert file.read(500) == data[1000:1500]
    with store.open(f"{at}/whole", sequential=True) as file:
        assert file.read() == data


def head(store: S3Store, at: str, folder: Path) -> None:
    store.put(f"{at}/k", b"four")
    assert store.info(f"{at}/k").size == 4


def listing(store: S3Store, at: str, folder: Path) -> None:
    keys = [f"{at}/{n:02}" for n in range(21)]  # two pages
    for key in keys:
        store.put(key, b"x")
    for _ in range(3):
        assert [info.key for info in store.list(at)] == keys


def put(store: S3Store, at: str, folder: Path) -> None:
    store.put(f"{at}/k", b"before")
    store.put(f"{at}/k", b"after")
    assert store.read(f"{at}/k") == b"after"
    assert store.claim(f"{at}/claim", b"mine") == b"mine"
    assert store.claim(f"{at}/claim", b"yours") == b"mine"


def upload(store: S3Store, at: str, folder: Path) -> None:
    data = os.urandom(9000)
    store.put_file(f"{at}/k", _file(folder, data))
    assert store.read(f"{at}/k") == data


def delete(store: S3Store, at: str, folder: Path) -> None:
    store.put(f"{at}/k", b"x")
    store.delete(f"{at}/k")
    with pytest.raises(FileNotFoundError):
        store.read(f"{at}/k")


WORK: dict[Operation, Callable[[S3Store, str, Path], None]] = {
    Operation.GET: get,
    Operation.HEAD: head,
    Operation.LIST: listing,
    Operation.PUT: put,
    Operation.CREATE_UPLOAD: upload,
    Operation.UPLOAD_PART: upload,
    Operation.COMPLETE: upload,
    Operation.DELETE: delete,
}


def _work(
    pairs: list[tuple[Kind, Operation]], store: S3Store, hasty: S3Store, folder: Path
) -> None:
    """Make each call in a place of its own for each kind of trouble."""

    def do(pair: tuple[Kind, Operation]) -> None:
        kind, operation = pair
        at = f"{kind}/{operation.name}"
        WORK[operation](hasty if kind in TIMED else store, at, folder)

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(do, pairs))


def _places(kind: Kind, operation: Operation) -> str:
    """Return what the addresses of calls in a place have in common."""
    # In the address of a listing the place is a parameter.
    between = "%2F" if operation is Operation.LIST else "/"
    return between.join(("out", kind, operation.name))


def test_each_call_survives_trouble_twice_in_a_row(
    store: S3Store, hasty: S3Store, fault_proxy: FaultProxy, tmp_path: Path, count: Count
) -> None:
    pairs: list[tuple[Kind, Operation]] = list(product([*QUICK, *TIMED], WORK))
    pairs += [("409", Operation.PUT), ("error_in_200", Operation.COMPLETE)]
    without_body = {Operation.HEAD, Operation.DELETE}
    pairs = [(kind, op) for kind, op in pairs if kind != "slow" or op not in without_body]
    rules = {
        (kind, op): fault_proxy.fail(kind, operation=op, contains=_places(kind, op), times=2)
        for kind, op in pairs
    }
    _work(pairs, store, hasty, tmp_path)
    assert {pair: rule.times for pair, rule in rules.items()} == dict.fromkeys(rules, 0)
    count(f"once: calls={fault_proxy.count()} faults={fault_proxy.faults} wrong=0")


def test_a_run_survives_trouble_of_three_calls_in_ten(
    store: S3Store, hasty: S3Store, fault_proxy: FaultProxy, tmp_path: Path, count: Count
) -> None:
    kinds = [*QUICK, *TIMED]
    for kind in kinds:
        for place in (f"out/{kind}/", f"out%2F{kind}%2F"):
            fault_proxy.fail(kind, contains=place, probability=0.3)
    _work(list(product(kinds, WORK)), store, hasty, tmp_path)
    met = Counter(call.kind for call in fault_proxy.calls if call.kind)
    count(f"30 %: calls={fault_proxy.count()} faults={fault_proxy.faults} wrong=0 {dict(met)}")
    assert all(met[kind] >= 3 for kind in kinds), met


def test_a_failed_upload_is_never_seen_and_leaves_no_parts(
    store: S3Store, faulty_bucket: Bucket, fault_proxy: FaultProxy, bucket: Bucket, tmp_path: Path
) -> None:
    """Whatever also happens to the call that has the parts forgotten."""
    path = _file(tmp_path, os.urandom(9000))
    for kind in QUICK:
        fault_proxy.clear()
        fault_proxy.fail("403", operation=Operation.UPLOAD_PART, contains="partNumber=3")
        fault_proxy.fail(kind, operation=Operation.ABORT, times=2)
        with pytest.raises(StorageError, match="AccessDenied"):
            store.put_file("upload", path)
        assert fault_proxy.count(Operation.ABORT) >= 3
        assert _uploads(bucket) == []
        assert list(store.list()) == []


@dataclass
class Clock:
    """A clock that goes on only when somebody sleeps."""

    now_s: float = 0.0
    sleeps: list[float] = field(default_factory=list)
    over: Callable[[], None] = lambda: None
    """What happens after a minute."""

    def time(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        before = self.now_s
        self.now_s += seconds
        self.sleeps.append(seconds)
        if before < 60 <= self.now_s:
            self.over()

    def patience(self) -> Patience:
        return Patience(clock=self.time, sleep=self.sleep)


@pytest.mark.parametrize("kind", ["503", "reset_after"])
def test_an_outage_of_a_minute_is_sat_out(
    kind: Kind, faulty_bucket: Bucket, fault_proxy: FaultProxy
) -> None:
    clock = Clock(over=fault_proxy.clear)
    store = S3Store(
        f"{faulty_bucket.uri}/out", faulty_bucket.storage, known=True, patience=clock.patience()
    )
    store.put("a", b"before")
    fault_proxy.fail(kind)
    store.put("a", b"after")
    assert store.read("a") == b"after"
    assert clock.now_s >= 60
    assert len(clock.sleeps) < 60, "no storm"


def test_every_try_is_ours_and_there_is_an_end_to_them(
    faulty_bucket: Bucket, fault_proxy: FaultProxy
) -> None:
    clock = Clock()
    store = S3Store(f"{faulty_bucket.uri}/out", faulty_bucket.storage, patience=clock.patience())
    kinds: list[Kind] = ["503", "reset_before"]
    for kind in kinds:
        fault_proxy.clear()
        clock.sleeps.clear()
        fault_proxy.fail(kind)
        with pytest.raises(StorageError) as caught:
            store.put("a", b"data")
        # aiohttp repeats a PUT once, at once, when its connection broke; it can't be told not to.
        each = 2 if kind == "reset_before" else 1
        assert fault_proxy.count() == each * (len(clock.sleeps) + 1), "the clients try once"
        assert 120 < sum(clock.sleeps) <= 150
        assert len(clock.sleeps) < 80
        assert caught.value.hint


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_real_minute(faulty_bucket: Bucket, fault_proxy: FaultProxy) -> None:
    store = S3Store(f"{faulty_bucket.uri}/out", faulty_bucket.storage)
    store.put("a", b"before")
    fault_proxy.fail("hang", probability=0.5)
    fault_proxy.fail("503")
    over = threading.Timer(60, fault_proxy.clear)
    over.start()
    began = time.monotonic()
    store.put("a", b"after")
    assert time.monotonic() - began > 55
    assert store.read("a") == b"after"


@pytest.mark.parametrize(
    ("kind", "said", "hint"),
    [
        ("403", "access denied", "credentials"),
        ("no_bucket", "no such bucket", "create it"),
        ("skew", "clock and this machine's are too far apart", "set this machine's clock"),
    ],
)
def test_what_does_not_pass_is_said_at_once(
    kind: Kind,
    said: str,
    hint: str,
    store: S3Store,
    fault_proxy: FaultProxy,
    tmp_path: Path,
    count: Count,
) -> None:
    fault_proxy.fail(kind)
    path = _file(tmp_path, os.urandom(9000))
    asked: list[tuple[Callable[[], object], int]] = [
        (lambda: probe(store), 2),
        (lambda: store.read("a"), 1),
        (lambda: list(store.list()), 1),
        (lambda: store.put("a", b""), 1),
        (lambda: store.put_file("a", path), 1),
    ]
    if kind != "skew":  # the answer to HEAD has no body to tell more than 403
        asked.append((lambda: store.info("a"), 2))
    took_s: list[float] = []
    for ask, calls in asked:
        fault_proxy.calls.clear()
        began = time.monotonic()
        with pytest.raises(StorageError, match=said) as caught:
            ask()
        took_s.append(time.monotonic() - began)
        assert hint in caught.value.hint
        assert fault_proxy.count() <= calls
    count(f"{kind}: told after {max(took_s):.2f} s, 2 calls at most")
    assert max(took_s) < 20, "5 s but on a busy machine; trying again takes 150 s"


def test_a_run_that_is_refused_ends_after_two_calls(
    faulty_bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    storage = faulty_bucket.storage.model_dump(exclude_defaults=True)
    spec = write_spec(tmp_path, {"uri": f"{faulty_bucket.uri}/out", "storage": storage})
    fault_proxy.fail("403")
    ran = subprocess.run(
        [COMMAND, "run", str(spec)], capture_output=True, text=True, check=False, timeout=120
    )
    assert ran.returncode == 2, ran.stderr
    assert "access denied" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert fault_proxy.count() <= 2


def test_one_of_many_claims_wins_whatever_answers_are_lost(
    faulty_bucket: Bucket, fault_proxy: FaultProxy, count: Count
) -> None:
    fault_proxy._dice.seed(SEED)
    told = contended(faulty_bucket, fault_proxy, claims=60, rivals=3)
    count(f"{told} seed={SEED}")


def test_parquet_is_read_through_trouble(
    store: S3Store, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    table = pa.table({"n": range(20_000)})
    pq.write_table(table, tmp_path / "t", row_group_size=1000)
    store.put_file("t", tmp_path / "t")
    fault_proxy.fail("truncate", probability=0.2)
    fault_proxy.fail("503", probability=0.2)
    with store.open("t") as file:
        parquet = pq.ParquetFile(file)
        groups = [parquet.read_row_group(n) for n in range(parquet.num_row_groups)]
    assert pa.concat_tables(groups) == table
    assert fault_proxy.faults > 3


@pytest.mark.timeout(300)
def test_a_job_survives_trouble_of_three_calls_in_ten(
    tmp_path: Path, ray_head: Head, faulty_bucket: Bucket, fault_proxy: FaultProxy, count: Count
) -> None:
    storage = faulty_bucket.storage.model_dump(exclude_defaults=True)
    spec = write_spec(tmp_path, {"uri": f"{faulty_bucket.uri}/out", "storage": storage})
    fault_proxy._dice.seed(SEED)
    for kind in QUICK:
        fault_proxy.fail(kind, probability=0.05)
    assert run_to_the_end(spec, ray_head) == 0, (tmp_path / "log").read_text()[-3000:]
    calls, faults = fault_proxy.count(), fault_proxy.faults
    fault_proxy.clear()
    proven(spec)
    count(f"job: calls={calls} faults={faults} wrong=0 seed={SEED}")
    assert faults > calls // 6
