"""Loading quantized weights: quantizing at load against a cache on a disk and on S3.

A Llama of 428 million random parameters in bfloat16, in shards of 200 MB, as nf4 with double
quantization. Each load is a process of its own, the ways alternate, and before each one its files
are taken out of the page cache. A tiny model is loaded first, so that imports are not measured.

- `quantize`: from the checkpoint.
- `local`: from a cache on the disk, in place.
- `s3`: from a cache on S3, by the first replica of a node: fetched, then loaded.
- `s3-again`: by the next replica of that node: from the copy.

What is counted: `file_bytes` are the weight files that a load opens, each once. `rchar` is what the
process asked the kernel to read (/proc/self/io; mapped files and sockets are not in it), and
`disk_bytes` what came from the disk for that (`read_bytes` there, mapped files included).
`peak_anon_bytes` is memory without pages of files, looked at every 5 ms (RssAnon), and
`peak_bytes` all that was resident, by the kernel's own account (VmHWM); both less what was there
before.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.util
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.spec import Model, Storage
from quantbatch.storage import S3Store
from quantbatch.weights.cache import WeightCache
from quantbatch.weights.dtypes import resolve
from quantbatch.weights.loading import load, weight_files
from quantbatch.weights.peak import PeakMemory

hf: Any = transformers

SHARD_BYTES = 200_000_000
SHAPE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 1,
    "dtype": "bfloat16",
}
TINY = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
BUCKET = "weights"
LOOK_EVERY_S = 0.005
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def write_models(folder: Path) -> int:
    """Write the model, and a tiny one of its kind.

    Returns:
        The number of the first one's parameters.
    """
    hf.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    _write(folder / "tiny", SHAPE | TINY)
    return _write(folder / "model", SHAPE)


def _write(folder: Path, shape: dict[str, Any]) -> int:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**shape))
    model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    return sum(parameter.numel() for parameter in model.parameters())


def ways() -> list[str]:
    """Return the ways of loading that can be measured here."""
    on_s3 = ["s3", "s3-again"] if importlib.util.find_spec("moto") else []
    return ["quantize", "local", *on_s3]


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Run moto's S3 server, with a bucket; gives its address, empty if it is not installed."""
    if "s3" not in ways():
        yield ""
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(CREDENTIALS)
    endpoint = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not _answers(endpoint):
            time.sleep(0.1)
        S3Store(f"s3://{BUCKET}", Storage(endpoint_url=endpoint))._fs.mkdir(BUCKET)
        yield endpoint
    finally:
        server.terminate()
        server.wait()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def spec(folder: Path, way: str, endpoint: str) -> Model:
    """Return how to load the model in one way."""
    model = Model(id=str(folder / "model"), bits=4)
    if way == "local":
        return model.model_copy(update={"cache": str(folder / "cache")})
    if way.startswith("s3"):
        storage = Storage(endpoint_url=endpoint)
        return model.model_copy(update={"cache": f"s3://{BUCKET}/c", "cache_storage": storage})
    return model


def measure(folder: Path, way: str, endpoint: str, threads: int) -> dict[str, Any]:
    """Load once, in this process, and return what it took."""
    torch.set_num_threads(threads)
    node = folder / f"node-{way.removesuffix('-again')}"
    node.mkdir(exist_ok=True)
    tempfile.tempdir = str(node)
    tiny = Model(id=str(folder / "tiny"), bits=4)
    load(open_checkpoint(tiny), tiny, "cpu")
    model = spec(folder, way, endpoint)
    checkpoint = open_checkpoint(model)
    _forget_files(folder)
    gc.collect()
    before = _io()
    with _AnonymousMemory() as memory:
        peak = PeakMemory("cpu")
        cpu, started = time.process_time(), time.perf_counter()
        loaded = load(checkpoint, model, "cpu")
        took = {"load_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}
    peak_bytes = peak.peak_bytes()
    after = _io()
    return {
        "way": way,
        **{name: round(value, 3) for name, value in took.items()},
        "file_bytes": _file_bytes(model),
        "rchar": after["rchar"] - before["rchar"],
        "disk_bytes": after["read_bytes"] - before["read_bytes"],
        "peak_anon_bytes": memory.peak_bytes,
        "peak_bytes": peak_bytes,
        "weight_bytes": loaded.weight_bytes,
        "logits": _digest(loaded.model),
    }


def _file_bytes(model: Model) -> int:
    checkpoint = open_checkpoint(model)
    cache = WeightCache.of(checkpoint, resolve(checkpoint, model, "cpu"), "cpu")
    files = (cache.files() if cache else []) or weight_files(checkpoint)
    return sum(path.stat().st_size for path in files)


def _digest(model: Any) -> str:
    """Return the SHA-256 of scores, as hex: equal where the scores are equal to the bit."""
    with torch.inference_mode():
        scores = model(torch.arange(128).view(2, 64)).logits
    return hashlib.sha256(scores.float().numpy().tobytes()).hexdigest()


def _forget_files(folder: Path) -> None:
    """Take all files of the benchmark out of the page cache."""
    for path in folder.rglob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.fdatasync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _io() -> dict[str, int]:
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(": ") for line in lines)}


class _AnonymousMemory:
    """The most memory of this process that is no page of a file, beyond what it had."""

    def __init__(self) -> None:
        self._started = _anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.peak_bytes = 0

    def _watch(self) -> None:
        while not self._done.wait(LOOK_EVERY_S):
            self.peak_bytes = max(self.peak_bytes, _anonymous_bytes() - self._started)

    def __enter__(self) -> _AnonymousMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next(line for line in lines if line.startswith("RssAnon"))
    return int(found.split()[1]) * 1024


def compared(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the ratios of quantizing at load to each other way, and whether goals are met."""
    first = [run for run in runs if run["way"] == "quantize"]
    found: dict[str, Any] = {"equal_logits": len({run["logits"] for run in runs}) == 1}
    for way in dict.fromkeys(run["way"] for run in runs):
        mine = [run for run in runs if run["way"] == way]
        limit = 1.3 * mine[0]["weight_bytes"] + SHARD_BYTES
        by_round = [a["load_s"] / b["load_s"] for a, b in zip(first, mine, strict=True)]
        found[way] = {
            "load_s": round(min(run["load_s"] for run in mine), 2),
            "times_faster_by_round": [round(ratio, 2) for ratio in by_round],
            "times_faster": round(statistics.median(by_round), 2),
            "bytes_to_quantize": round(mine[0]["file_bytes"] / first[0]["file_bytes"], 3),
            "peak_to_limit": round(max(run["peak_bytes"] for run in mine) / limit, 2),
            "peak_anon_to_limit": round(max(run["peak_anon_bytes"] for run in mine) / limit, 2),
        }
    return found


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Return one line for each run, for people."""
    head = f"{'way':10}{'load s':>8}{'CPU s':>8}{'files MB':>10}{'rchar':>8}{'disk':>8}"
    lines = [f"{head}{'anon MB':>9}{'peak MB':>9}"]
    for run in runs:
        sizes = ("file_bytes", "rchar", "disk_bytes", "peak_anon_bytes", "peak_bytes")
        mb = [run[name] / 1e6 for name in sizes]
        lines.append(
            f"{run['way']:10}{run['load_s']:8.2f}{run['cpu_s']:8.2f}"
            f"{mb[0]:10.0f}{mb[1]:8.0f}{mb[2]:8.0f}{mb[3]:9.0f}{mb[4]:9.0f}"
        )
    return "\n".join(lines)
