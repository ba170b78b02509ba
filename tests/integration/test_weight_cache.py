"""The cache of quantized weights with tiny models: bit-equal, on disk and S3, under attack."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from quantbatch.errors import DoesNotFit
from quantbatch.model.checkpoint import open_checkpoint
from quantbatch.spec import FourBit, Int8, Model
from quantbatch.weights import bnb, pretrained
from quantbatch.weights.loading import load
from tests.integration.llama import make_llama, make_model
from tests.integration.test_weights import ARCHITECTURES, logits

if TYPE_CHECKING:
    from quantbatch.spec import Storage
    from quantbatch.weights.loading import LoadedModel
    from tests.integration.support import Bucket

KINDS: dict[str, FourBit | Int8] = {
    "nf4+dq": FourBit(),
    "nf4": FourBit(double_quant=False),
    "fp4": FourBit(kind="fp4"),
    "int8": Int8(),
    "skipping": FourBit(skip_modules=["down_proj"]),
    "stored in bfloat16": FourBit(storage_dtype="bfloat16"),
}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged of weights; a store that is asked again says so only now and then."""
    return [each.message for each in caplog.records if each.name.startswith("quantbatch.weights")]


@pytest.fixture(autouse=True)
def _own_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def quantizations(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One item for each load: whether it quantized."""
    seen: list[bool] = []
    real = pretrained.load_pretrained

    def note(*args: Any, **kwargs: Any) -> Any:
        seen.append("quantization_config" in kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(pretrained, "load_pretrained", note)
    return seen


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def cached(folder: Path, cache: Path | str, **fields: Any) -> LoadedModel:
    model = Model(id=str(folder), cache=str(cache), **fields)
    return load(open_checkpoint(model), model, "cpu")


def settings(found: LoadedModel) -> Any:
    model: Any = found.model
    config = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}
    return config, model.generation_config.to_dict()


def same(one: LoadedModel, other: LoadedModel) -> None:
    assert torch.equal(logits(one.model), logits(other.model))
    assert one[1:] == other[1:]
    assert settings(one) == settings(other)
    ours, theirs = (dict(each.model.named_parameters()) for each in (one, other))
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        # Codes that are packed as floating-point numbers may be NaN, which equals nothing.
        assert torch.equal(parameter.view(torch.uint8), theirs[name].view(torch.uint8)), name
        assert parameter.dtype == theirs[name].dtype


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_quantizing_at_load(
    tmp_path: Path, kind: str, tied: bool, quantizations: list[bool]
) -> None:
    folder = make_llama(tmp_path / "model", tied=tied)
    plain = Model(id=str(folder), quantization=KINDS[kind])
    first = load(open_checkpoint(plain), plain, "cpu")
    same(cached(folder, tmp_path / "cache", quantization=KINDS[kind]), first)
    same(cached(folder, tmp_path / "cache", quantization=KINDS[kind]), first)
    assert quantizations == [True, True, False]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_comes_back_as_it_was(
    tmp_path: Path, model_type: str, bits: int, quantizations: list[bool]
) -> None:
    make_model(tmp_path / "m", model_type, **ARCHITECTURES[model_type])
    first = cached(tmp_path / "m", tmp_path / "cache", bits=bits, dtype="bfloat16")
    same(cached(tmp_path / "m", tmp_path / "cache", bits=bits, dtype="bfloat16"), first)
    assert quantizations == [True, False]


def test_one_entry_serves_every_threshold_and_compute_type(
    folder: Path, tmp_path: Path, quantizations: list[bool]
) -> None:
    for options in (
        Int8(),
        Int8(threshold=0),
        FourBit(compute_dtype="float16"),
        FourBit(compute_dtype="float32"),
    ):
        plain = Model(id=str(folder), quantization=options)
        expected = load(open_checkpoint(plain), plain, "cpu")
        same(cached(folder, tmp_path, quantization=options), expected)
    assert quantizations == [True, True, True, False, True, True, True, False]


def test_a_model_that_ran_leaves_the_entry_as_it_is(folder: Path, tmp_path: Path) -> None:
    """On a CPU its weights are mapped from there."""
    found = cached(folder, tmp_path, bits=8)
    again = cached(folder, tmp_path, bits=8)
    logits(again.model)
    with torch.no_grad():
        next(again.model.parameters()).zero_()
    same(cached(folder, tmp_path, bits=8), found)


@pytest.mark.parametrize("damage", [flip_a_byte, lambda p: os.truncate(p, 999), Path.unlink])
def test_a_damaged_entry_is_made_again_under_a_reader(
    folder: Path,
    tmp_path: Path,
    damage: Any,
    quantizations: list[bool],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = cached(folder, tmp_path, bits=4)
    reader = cached(folder, tmp_path, bits=4)
    expected = logits(first.model)
    (file,) = tmp_path.glob("*/*/model.safetensors")
    file.rename(file.with_suffix(".kept"))  # the reader has that one mapped
    file.write_bytes(file.with_suffix(".kept").read_bytes())
    damage(file)
    same(cached(folder, tmp_path, bits=4), first)
    assert "is damaged and made again" in caplog.text
    caplog.clear()
    same(cached(folder, tmp_path, bits=4), first)
    assert said(caplog) == []
    assert quantizations == [True, False, True, False]
    assert torch.equal(logits(reader.model), expected)
    records = [path.name for path in sorted(tmp_path.glob("*/record-*"))]
    assert records == ["record-000001.json", "record-000002.json"]


def test_what_was_stored_and_does_not_load_is_a_warning(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A whole entry that is not the model's: strict loading refuses it, and the job goes on."""
    other = make_llama(tmp_path / "other", num_hidden_layers=3)
    model = Model(id=str(folder), bits=4, cache=str(tmp_path / "cache"))
    foreign = Model(id=str(other), bits=4)
    monkeypatch.setattr("quantbatch.weights.cache.identity", lambda *_: {"of": "both"})
    load(open_checkpoint(foreign), foreign.model_copy(update={"cache": model.cache}), "cpu")
    found = load(open_checkpoint(model), model, "cpu")
    assert "is whole, but of no use, going on without" in caplog.text
    plain = model.model_copy(update={"cache": None})
    same(found, load(open_checkpoint(plain), plain, "cpu"))


def test_too_little_memory_is_no_fault_of_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached(folder, tmp_path, bits=4)

    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pretrained.hf.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(DoesNotFit):
        cached(folder, tmp_path, bits=4)


REPLICA = """
import logging, sys, tempfile, time, torch
from pathlib import Path
from quantbatch.weights import pretrained
from tests.integration.test_weight_cache import cached, logits

torch.set_num_threads(1)
logging.basicConfig(level="INFO", stream=sys.stdout)
folder, cache, tempfile.tempdir, scores = sys.argv[1:]
real = pretrained.load_pretrained

def slow(*args, **kwargs):
    print("quantizes" if "quantization_config" in kwargs else "loads", flush=True)
    time.sleep(0.5)  # the others come meanwhile
    return real(*args, **kwargs)

pretrained.load_pretrained = slow
print("ready", flush=True)
sys.stdin.readline()
torch.save(logits(cached(Path(folder), cache, bits=4).model), scores)
"""


def replicas(folder: Path, tmp_path: Path, nodes: list[str]) -> list[str]:
    """Load in a process on each of some nodes, at once; return what they said, in no order."""
    started: list[Any] = []
    for number, node in enumerate(nodes):
        (tmp_path / node).mkdir(exist_ok=True)
        arguments = [folder, tmp_path / "cache", tmp_path / node, tmp_path / f"{number}.pt"]
        command = [sys.executable, "-c", REPLICA, *map(str, arguments)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, **pipes))
    for replica in started:
        assert replica.stdout.readline() == "ready\n"
    for replica in started:
        replica.stdin.write("\n")
        replica.stdin.flush()
    said = [replica.communicate(timeout=60)[0] for replica in started]
    assert [replica.returncode for replica in started] == [0] * len(nodes), said
    return said


def test_two_nodes_that_write_at_once_are_harmless(
    folder: Path, tmp_path: Path, quantizations: list[bool]
) -> None:
    said = replicas(folder, tmp_path, ["one", "another"])
    assert all("quantizes" in each for each in said)
    found = cached(folder, tmp_path / "cache", bits=4)
    assert quantizations == [False]
    for number in range(2):
        assert torch.equal(logits(found.model), torch.load(tmp_path / f"{number}.pt"))
    assert len(list(tmp_path.glob("cache/*/record-*"))) == 1
    assert len(list(tmp_path.glob("cache/*/*/model.safetensors"))) == 1, "the loser's are gone"


def test_replicas_of_one_node_wait_for_the_first(folder: Path, tmp_path: Path) -> None:
    """It quantizes and fills the cache; the other one loads that."""
    said = replicas(folder, tmp_path, ["node"] * 2)
    assert sum("quantizes" in each for each in said) == 1
    assert sum("is the first to load this model: waiting" in each for each in said) == 1
    assert torch.equal(torch.load(tmp_path / "0.pt"), torch.load(tmp_path / "1.pt"))


# ---- S3


def on_s3(folder: Path, uri: str, storage: Storage) -> LoadedModel:
    return cached(folder, uri, bits=4, cache_storage=storage)


def test_a_cache_on_s3(
    folder: Path,
    tmp_path: Path,
    bucket: Bucket,
    quantizations: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = Model(id=str(folder), bits=4)
    expected = load(open_checkpoint(plain), plain, "cpu")
    uri = f"{bucket.uri}/weights"
    for _ in range(3):
        same(on_s3(folder, uri, bucket.storage), expected)
    assert quantizations == [True, True, False, False]
    (tmp_path / "another").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "another"))
    same(on_s3(folder, uri, bucket.storage), expected)
    assert quantizations[4:] == [False]

    store = bucket.store("weights")
    (key,) = [info.key for info in store.list() if info.key.endswith(".safetensors")]
    content = bytearray(store.read(key))
    content[-1] ^= 1
    store.put(key, bytes(content))
    same(on_s3(folder, uri, bucket.storage), expected)  # this node's copy is whole
    (tmp_path / "third").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "third"))
    assert said(caplog) == []
    same(on_s3(folder, uri, bucket.storage), expected)
    assert "another SHA-256 than when it was stored" in caplog.text
    assert quantizations[5:] == [False, True]
    caplog.clear()
    same(on_s3(folder, uri, bucket.storage), expected)
    assert quantizations[7:] == [False]
    assert said(caplog) == []


def test_no_server_and_no_bucket_are_warnings(
    folder: Path, bucket: Bucket, quantizations: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = bucket.storage.model_copy(update={"endpoint_url": "http://127.0.0.1:9"})
    on_s3(folder, f"{bucket.uri}/weights", nowhere)
    (warning,) = said(caplog)
    assert "model.cache can't be read, going on without" in warning
    caplog.clear()
    on_s3(folder, "s3://no-such-bucket-here/weights", bucket.storage)
    (warning,) = said(caplog)
    assert "no such bucket" in warning
    assert quantizations == [True, True]


def test_the_bytes_of_a_cached_model_are_counted_alike(folder: Path, tmp_path: Path) -> None:
    found = cached(folder, tmp_path, bits=4), cached(folder, tmp_path, bits=4)
    assert bnb.parameter_bytes(found[0].model) == bnb.parameter_bytes(found[1].model)
    files = sum(path.stat().st_size for path in tmp_path.glob("*/*/*.safetensors"))
    assert found[0].weight_bytes < files < 1.2 * found[0].weight_bytes
