"""Models as files: what is read from them, and what is refused."""

from __future__ import annotations

import http.server
import json
import math
import os
import re
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typing_extensions import override

from quantbatch.errors import ModelError
from quantbatch.model import formats
from quantbatch.model.checkpoint import SAMPLE_BYTES, Checkpoint, open_checkpoint
from quantbatch.model.headers import SINGLE_FILE, TensorInfo
from quantbatch.spec import FourBit, Int8, Model, Unquantized
from tests.unit.model.ggufs import LLAMA, TENSORS, gguf_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 512,
    "dtype": "bfloat16",
}
ITEM_BYTES = {"F32": 4, "BF16": 2, "U8": 1}
Shapes = dict[str, tuple[str, tuple[int, ...]]]
Fields = dict[str, Any]
"""Fields of `model` in a spec."""
SHAPES: Shapes = {
    "model.embed_tokens.weight": ("BF16", (32, 8)),
    "model.layers.0.mlp.up_proj.weight": ("BF16", (16, 8)),
    "model.norm.weight": ("F32", (8,)),
}


def write_tensors(path: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Write a safetensors file whose data counts up."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + ITEM_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    data = (bytes(range(251)) * (end // 251 + 1))[:end]
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_model(folder: Path, config: Mapping[str, Any] = CONFIG, shapes: Shapes = SHAPES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    write_tensors(folder / SINGLE_FILE, shapes)
    return folder


def write_shards(folder: Path) -> Path:
    """Write the same model as two shards and an index."""
    write_model(folder)
    (folder / SINGLE_FILE).unlink()
    names = list(SHAPES)
    write_tensors(folder / "a.safetensors", {name: SHAPES[name] for name in names[:1]})
    write_tensors(folder / "b.safetensors", {name: SHAPES[name] for name in names[1:]})
    weight_map = {
        name: "a.safetensors" if i < 1 else "b.safetensors" for i, name in enumerate(names)
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def open_folder(folder: Path, fields: Fields = {}) -> Checkpoint:  # noqa: B006 - never changed
    return open_checkpoint(Model.model_validate({"id": str(folder), **fields}))


def refusal(folder: Path | str, fields: Fields = {}) -> str:  # noqa: B006 - never changed
    with pytest.raises(ModelError) as caught:
        open_checkpoint(Model.model_validate({"id": str(folder), **fields}))
    return str(caught.value)


# ---- a folder


def test_a_folder_is_described_from_its_headers(tmp_path: Path) -> None:
    checkpoint = open_folder(write_model(tmp_path / "model"))
    assert checkpoint.folder == tmp_path / "model"
    assert checkpoint.commit == ""
    assert checkpoint.config == CONFIG
    assert checkpoint.tensors == tuple(TensorInfo(n, d, s) for n, (d, s) in SHAPES.items())
    assert checkpoint.tensors[0].numel == 256
    assert (checkpoint.context_tokens, checkpoint.quantized) == (512, None)
    assert checkpoint.chat_template is None
    assert re.fullmatch("[0-9a-f]{64}", checkpoint.digest)


def test_shards_hold_what_the_single_file_holds(tmp_path: Path) -> None:
    single = open_folder(write_model(tmp_path / "single"))
    sharded = open_folder(write_shards(tmp_path / "sharded"))
    assert sharded.tensors == single.tensors


def test_the_working_folder_and_the_home_folder_are_where_names_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_folder(Path("model")).digest == open_folder(Path("~/model")).digest


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "T"),
        ("chat_template.json", '{"chat_template": "T"}'),
        ("tokenizer_config.json", '{"chat_template": "T"}'),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"name": "tool_use", "template": "X"},'
            ' {"name": "default", "template": "T"}]}',
        ),
    ],
)
def test_the_chat_template_is_found_wherever_it_is(tmp_path: Path, name: str, content: str) -> None:
    (write_model(tmp_path) / name).write_text(content)
    assert open_folder(tmp_path).chat_template == "T"


def test_the_newest_place_of_a_chat_template_wins(tmp_path: Path) -> None:
    (write_model(tmp_path) / "tokenizer_config.json").write_text('{"chat_template": "old"}')
    (tmp_path / "chat_template.jinja").write_text("new")
    assert open_folder(tmp_path).chat_template == "new"


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"max_position_embeddings": 131072}, 131072),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 77}, "max_position_embeddings": None}, 77),
        ({"max_position_embeddings": None}, None),
    ],
)
def test_the_context_has_many_names(
    tmp_path: Path, config: dict[str, Any], tokens: int | None
) -> None:
    assert open_folder(write_model(tmp_path, CONFIG | config)).context_tokens == (
        tokens if config != {"n_positions": 1024} else 512
    )
    bare = {name: value for name, value in CONFIG.items() if name != "max_position_embeddings"}
    assert open_folder(write_model(tmp_path, bare | config)).context_tokens == tokens


# ---- identity


def test_a_copy_is_the_same_model(tmp_path: Path) -> None:
    first, second = write_model(tmp_path / "a"), write_model(tmp_path / "b")
    os.utime(second / SINGLE_FILE, (0, 0))
    assert open_folder(first).digest == open_folder(second).digest


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"]
)
def test_another_small_file_is_another_model(tmp_path: Path, name: str) -> None:
    before = open_folder(write_model(tmp_path)).digest
    (tmp_path / name).write_text(json.dumps(CONFIG | {"note": 1}))
    assert open_folder(tmp_path).digest != before


def test_retrained_weights_are_another_model(tmp_path: Path) -> None:
    """Of a file of 12 MiB, every stretch of a 32nd is looked into."""
    folder = write_model(tmp_path, shapes={"w": ("U8", (12, 1024, 1024))})
    before = open_folder(folder).digest
    whole = (folder / SINGLE_FILE).read_bytes()
    stretch = len(whole) // 32
    changed = bytearray(whole)
    changed[len(whole) // 2 : len(whole) // 2 + stretch] = bytes(stretch)
    (folder / SINGLE_FILE).write_bytes(changed)
    assert open_folder(folder).digest != before
    (folder / SINGLE_FILE).write_bytes(whole[:-1] + b"\xff")
    assert open_folder(folder).digest != before
    (folder / SINGLE_FILE).write_bytes(whole)
    assert open_folder(folder).digest == before


def test_every_byte_of_a_small_file_counts(tmp_path: Path) -> None:
    folder = write_model(tmp_path, shapes={"w": ("U8", (5, SAMPLE_BYTES // 2))})
    before = open_folder(folder).digest
    whole = bytearray((folder / SINGLE_FILE).read_bytes())
    for position in range(len(whole) - 5 * SAMPLE_BYTES // 2, len(whole), 4999):
        changed = bytearray(whole)
        changed[position] ^= 1
        (folder / SINGLE_FILE).write_bytes(changed)
        assert open_folder(folder).digest != before, position


def test_sixty_gigabytes_take_well_under_a_second(tmp_path: Path) -> None:
    write_shards(tmp_path)
    weight_map = {}
    for shard in range(14):
        name = f"{shard}.safetensors"
        weight_map[f"w{shard}"] = name
        end = 4_500_000_000
        header = {f"w{shard}": {"dtype": "U8", "shape": [end], "data_offsets": [0, end]}}
        text = json.dumps(header).encode()
        (tmp_path / name).write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(tmp_path / name, 8 + len(text) + end)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    started = time.perf_counter()
    assert sum(tensor.numel for tensor in open_folder(tmp_path).tensors) == 14 * 4_500_000_000
    assert time.perf_counter() - started < 1


# ---- what can't work


def test_a_misspelt_path_gets_a_suggestion(tmp_path: Path) -> None:
    write_model(tmp_path / "llama-tiny")
    message = refusal(tmp_path / "lama-tiny")
    assert "there is no such folder" in message
    assert f"did you mean {tmp_path / 'llama-tiny'}?" in message


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is a file" in refusal(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("adapter_config.json", "merge it into its base model"),
        ("model.Q4_K_M.gguf", "name the GGUF file as model.file"),
        ("notes.txt", "save_pretrained"),
    ],
)
def test_a_folder_without_a_configuration_is_explained(
    tmp_path: Path, file: str, words: str
) -> None:
    (tmp_path / file).write_text("{}")
    message = refusal(tmp_path)
    assert "has no config.json" in message
    assert words in message


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    (write_model(tmp_path) / "config.json").write_text("{")
    assert "config.json can't be read" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "holds no JSON object" in refusal(tmp_path)


def test_pickled_weights_are_refused_with_the_reason(tmp_path: Path) -> None:
    (write_model(tmp_path) / SINGLE_FILE).rename(tmp_path / "pytorch_model.bin")
    message = refusal(tmp_path)
    assert "pickles only (pytorch_model.bin), which can run code" in message
    assert "save_pretrained" in message


def test_no_weights_at_all_are_refused(tmp_path: Path) -> None:
    (write_model(tmp_path) / SINGLE_FILE).unlink()
    assert "has neither model.safetensors nor" in refusal(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (write_shards(tmp_path) / "b.safetensors").unlink()
    assert "lacks b.safetensors" in refusal(tmp_path)


def test_a_shard_of_another_model_is_noticed(tmp_path: Path) -> None:
    write_tensors(write_shards(tmp_path) / "b.safetensors", {"other": ("F32", (1,))})
    message = refusal(tmp_path)
    assert "lack model.layers.0.mlp.up_proj.weight, model.norm.weight" in message


def test_an_index_without_a_map_is_refused(tmp_path: Path) -> None:
    (write_shards(tmp_path) / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in refusal(tmp_path)


def test_a_file_cut_short_is_noticed_wherever_it_is_cut(tmp_path: Path) -> None:
    whole = (write_model(tmp_path) / SINGLE_FILE).read_bytes()
    for length in (0, 4, 8, 30, len(whole) - 1):
        (tmp_path / SINGLE_FILE).write_bytes(whole[:length])
        assert SINGLE_FILE in refusal(tmp_path)


@pytest.mark.parametrize(
    "header",
    [b"{", b"[]", b'{"w": 3}', b'{"w": {"dtype": "F32", "shape": 3, "data_offsets": [0, 0]}}',
     b'{"w": {"dtype": "F32", "shape": [1]}}', b"\xff\xfe"],
)  # fmt: skip
def test_a_tampered_header_is_refused(tmp_path: Path, header: bytes) -> None:
    (write_model(tmp_path) / SINGLE_FILE).write_bytes(struct.pack("<Q", len(header)) + header)
    assert "damaged header" in refusal(tmp_path)


def test_code_of_its_own_is_refused_where_transformers_lacks_the_model(tmp_path: Path) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    own = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    assert "needs Python code of its own" in refusal(write_model(tmp_path, CONFIG | own))
    known = CONFIG | {"auto_map": auto_map}
    assert open_folder(write_model(tmp_path, known)).config["model_type"] == "llama"


@pytest.mark.parametrize("names", [["T5ForConditionalGeneration"], ["BertModel"], [], None])
def test_other_tasks_are_refused(tmp_path: Path, names: list[str] | None) -> None:
    assert "no causal language model" in refusal(
        write_model(tmp_path, CONFIG | {"architectures": names})
    )


def test_gpt2_is_a_causal_model_by_another_name(tmp_path: Path) -> None:
    config = CONFIG | {"architectures": ["GPT2LMHeadModel"]}
    assert open_folder(write_model(tmp_path, config)).config == config


# ---- quantized already

NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
}
INT8 = {"load_in_8bit": True}
UP = "model.layers.0.mlp.up_proj.weight"
SCALES: Shapes = {f"{UP}.quant_state.bitsandbytes__nf4": ("U8", (90,))}


@pytest.mark.parametrize(
    ("section", "method", "fields"),
    [
        (None, None, {"bits": 4}),
        (NF4, "bitsandbytes", {}),
        (NF4, "bitsandbytes", {"quantization": Unquantized()}),
        (NF4, "bitsandbytes", {"bits": 4}),
        (NF4, "bitsandbytes", {"quantization": FourBit(compute_dtype="float32")}),
        (INT8, "bitsandbytes", {"bits": 8}),
        ({"quant_method": "gptq", "bits": 4}, "gptq", {}),
    ],
)
def test_a_quantized_checkpoint_is_taken_as_it_is(
    tmp_path: Path,
    section: dict[str, Any] | None,
    method: str | None,
    fields: Fields,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packages = {"bitsandbytes": "0.50.2", "gptqmodel": "7.7.0", "optimum": "2.3.0"}
    monkeypatch.setattr(formats, "_installed", lambda: packages)
    write_model(tmp_path, CONFIG | {"quantization_config": section}, SHAPES | SCALES)
    assert open_folder(tmp_path, fields).quantized == method


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("gptq", 'pip install "quantbatch[gptq]"'),
        ("hqq", "NotImplementedError"),
        ("fp8", "model.allow_dequantize: true"),
        ("fp3", "does not know this method"),
    ],
)
def test_a_format_that_can_not_be_loaded_here_is_refused_with_the_remedy(
    tmp_path: Path, method: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_installed", dict)
    message = refusal(
        write_model(tmp_path, CONFIG | {"quantization_config": {"quant_method": method}})
    )
    assert f"is quantized with {method}" in message
    assert words in message


def test_a_card_that_multiplies_fp8_needs_no_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_installed", lambda: {"kernels": "0.18.2"})
    write_model(tmp_path, CONFIG | {"quantization_config": {"quant_method": "fp8"}})
    model = Model(id=str(tmp_path))
    assert not open_checkpoint(model, (8, 9)).expanded
    allowed = model.model_copy(update={"allow_dequantize": True})
    assert not open_checkpoint(allowed, (8, 9)).expanded
    assert open_checkpoint(allowed, (8, 6)).expanded
    assert open_checkpoint(allowed).expanded
    with pytest.raises(ModelError, match=r"compute capability 8\.9"):
        open_checkpoint(model, (8, 6))


@pytest.mark.parametrize(
    ("section", "fields", "there", "asked"),
    [
        (NF4, {"bits": 8}, "nf4 with double quantization", "8 bits (bitsandbytes int8)"),
        (NF4, {"bits": 16}, "nf4", "16 bits"),
        (NF4, {"quantization": FourBit(kind="fp4")}, "nf4", "fp4"),
        (NF4, {"quantization": FourBit(double_quant=False)}, "nf4 with", "bitsandbytes nf4"),
        (INT8, {"bits": 4}, "int8", "4 bits"),
        ({"quant_method": "gptq"}, {"quantization": Int8()}, "gptq", "bitsandbytes int8"),
        ({"quant_method": "fp8"}, {"bits": 4}, "fp8", "nf4"),
    ],
)
def test_a_quantized_checkpoint_is_not_quantized_otherwise(
    tmp_path: Path, section: dict[str, Any], fields: Fields, there: str, asked: str
) -> None:
    message = refusal(write_model(tmp_path, CONFIG | {"quantization_config": section}), fields)
    assert "is quantized already" in message
    assert there in message.partition("but the job asks for")[0]
    assert asked in message.partition("but the job asks for")[2]


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ("gptq", "quantization_config is 'gptq', and not a section of fields"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf5"},
            "says what bitsandbytes does not know",
        ),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "says that bitsandbytes quantized its weights, but none of them has a scale",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "none of them has a scale"),
    ],
)
def test_a_section_on_quantization_that_is_not_true_is_refused(
    tmp_path: Path, section: Any, problem: str
) -> None:
    folder = write_model(tmp_path / "m", CONFIG | {"quantization_config": section})
    with pytest.raises(ModelError, match=problem):
        open_checkpoint(Model(id=str(folder), bits="auto" if "scale" in problem else 4))


# ---- the hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(http.server.ThreadingHTTPServer):
    """As much of the hub's API as describing a model needs, over the files of a folder."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.gated = False
        self.served: list[str] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @override
    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        assert isinstance(self.server, FakeHub)
        hub, path = self.server, self.path.partition("?")[0]
        match path.strip("/").split("/"):
            case ["api", "models", "org", "model", *rest] if not rest or rest in (
                ["revision", "main"],
                ["revision", COMMIT],
            ):
                self._json({"id": "org/model", "sha": COMMIT, "siblings": []})
            case ["api", "models", "org", "model", "revision", _]:
                self._fail(404, "RevisionNotFound")
            case ["api", "models", "org", "model", "tree", _]:
                files = sorted(hub.folder.iterdir())
                self._json(
                    [
                        {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": f.name}
                        for f in files
                    ]
                )
            case ["org", "model", "resolve", _, _] if hub.gated:
                self._fail(403, "GatedRepo")
            case ["org", "model", "resolve", _, name]:
                self._file(hub, name)
            case _:
                self._fail(404, "RepoNotFound")

    def _file(self, hub: FakeHub, name: str) -> None:
        if not (hub.folder / name).is_file():
            return self._fail(404, "EntryNotFound")
        content = (hub.folder / name).read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = content[int(asked[1]) : int(asked[2]) + 1] if asked else content
        if self.command == "GET":
            hub.served.append(name)
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", COMMIT)
        return self._body(part)

    def _json(self, document: object) -> None:
        self.send_response(200)
        self._body(json.dumps(document).encode())

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self._body(b"{}")

    def _body(self, content: bytes) -> None:
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    import huggingface_hub.constants as constants

    (tmp_path / "repository").mkdir()
    server = FakeHub(tmp_path / "repository")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def test_a_repository_is_described_without_its_weights(hub: FakeHub) -> None:
    write_shards(hub.folder)
    checkpoint = open_checkpoint(Model(id="org/model"))
    assert checkpoint.commit == checkpoint.digest == COMMIT
    assert checkpoint.config == CONFIG
    assert checkpoint.tensors == tuple(TensorInfo(n, d, s) for n, (d, s) in SHAPES.items())
    assert {file.name for file in checkpoint.folder.iterdir()} == {
        "config.json", "tokenizer.json", "model.safetensors.index.json",
    }  # fmt: skip


def test_what_is_in_the_cache_serves_without_a_network(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants
    from huggingface_hub import snapshot_download

    write_model(hub.folder)
    online = open_checkpoint(Model(id="org/model"))
    snapshot_download("org/model")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert open_checkpoint(Model(id="org/model")) == online
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_checkpoint(Model(id="org/model")) == online
    assert open_checkpoint(Model(id="org/model", revision=COMMIT)) == online


def test_no_network_is_told_in_seconds(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.perf_counter()
    message = refusal("org/model")
    assert "neither a folder here nor wholly in the hub's cache" in message
    assert "can't be reached (ConnectError" in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "OfflineModeIsEnabled" in refusal("org/model")
    assert time.perf_counter() - started < 3


def test_a_server_that_never_answers_is_given_up(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    import huggingface_hub.constants as constants

    import quantbatch.model.hub

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(quantbatch.model.hub, "TIMEOUT_S", 0.2)
        assert "can't be reached (ReadTimeout" in refusal("org/model")


def test_offline_with_the_small_files_only_names_the_weights(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    write_model(hub.folder)
    open_checkpoint(Model(id="org/model"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "nor wholly in the hub's cache" in refusal("org/model")


def test_an_unknown_repository_is_told_from_an_unknown_folder(hub: FakeHub, tmp_path: Path) -> None:
    write_model(tmp_path / "models" / "llama")
    message = refusal("models/lama")
    assert "neither a folder here nor a repository" in message
    assert "did you mean models/llama?" in message


def test_an_unknown_revision_is_named(hub: FakeHub) -> None:
    write_model(hub.folder)
    assert "org/model at revision v9: there is no such revision" in refusal(
        "org/model", {"revision": "v9"}
    )


def test_a_gated_repository_says_where_to_accept_its_licence(hub: FakeHub) -> None:
    write_model(hub.folder)
    hub.gated = True
    assert "https://huggingface.co/org/model and set HF_TOKEN" in refusal("org/model")


def test_a_repository_of_pickles_is_refused(hub: FakeHub) -> None:
    (write_model(hub.folder) / SINGLE_FILE).rename(hub.folder / "pytorch_model.bin")
    assert "pickles only (pytorch_model.bin)" in refusal("org/model")
    assert "pytorch_model.bin" not in hub.served


def test_of_a_gguf_file_the_beginning_is_read(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import quantbatch.model.hub

    words = ["<end>", *(f"word {i}" for i in range(4000))]
    values = LLAMA | {"tokenizer.ggml.tokens": words}
    content = gguf_bytes(values, TENSORS)
    (hub.folder / "model.gguf").write_bytes(content)
    monkeypatch.setattr(quantbatch.model.hub, "FIRST_GGUF_BYTES", 2048)
    monkeypatch.setattr(formats, "_installed", lambda: {"gguf": "0.19.0"})
    model = Model(id="org/model", file="model.gguf", allow_dequantize=True)
    checkpoint = open_checkpoint(model)
    assert hub.served == ["model.gguf"] * 4, "2, 8, 32 and 128 KiB"
    assert checkpoint.commit == COMMIT
    assert (checkpoint.quantized, checkpoint.expanded) == ("gguf", True)
    assert checkpoint.config["vocab_size"] == len(words)
    (hub.folder / "model-q4.gguf").write_bytes(content)
    other = open_checkpoint(model.model_copy(update={"file": "model-q4.gguf"}))
    assert other.digest != checkpoint.digest, "answers of two files of a commit are kept apart"
    missing = Model(id="org/model", file="other.gguf")
    with pytest.raises(ModelError, match=r"other\.gguf"):
        open_checkpoint(missing)
    (hub.folder / "model.gguf").write_bytes(content[:9000])
    with pytest.raises(ModelError, match="damaged header, or is cut short"):
        open_checkpoint(model)


# ---- the import law


def test_describing_and_planning_import_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, quantbatch.model.checkpoint, quantbatch.model.memory;"
        "print({'torch', 'transformers', 'ray', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
