"""A job is judged by the cluster's own cards, before one of them is asked for."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from quantbatch.spec import JobSpec
from tests.integration.support import MODEL
from tests.unit.model.test_known_sizes import KNOWN, checkpoint_of

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
import json, sys
import ray
from quantbatch import cluster, pipeline
from quantbatch.errors import DoesNotFit
from quantbatch.model import thiscard
from quantbatch.spec import Cluster, JobSpec

thiscard.local_cards = list  # this machine has none
# A node has one kind of card in truth; two stand for a cluster with two kinds.
cards = {"accelerator_type:L4": 1, "accelerator_type:A100": 1}
ray.init(num_cpus=2, num_gpus=1, resources=cards, include_dashboard=False, log_to_driver=False)
found = {"cards": cluster.card_names(Cluster())}
try:
    pipeline.run(JobSpec.model_validate_json(sys.argv[1]))
except DoesNotFit as error:
    found |= {"problem": error.problem, "hint": error.hint}
print(json.dumps(found | {"free": ray.available_resources()["GPU"]}))
"""
"""A process of its own, because a Ray that is started in this one would disturb later tests'."""


def hollow_model(folder: Path, name: str) -> Path:
    """Save a published model as far as planning looks at it: the tensors' data are holes in a
    sparse file, which take no room.
    """
    checkpoint = checkpoint_of(KNOWN[name].config)
    folder.mkdir()
    header: dict[str, Any] = {}
    end = 0
    for tensor in checkpoint.tensors:
        start, end = end, end + 2 * tensor.numel
        header[tensor.name] = {
            "dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(checkpoint.config | config))
    for file_name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (MODEL / file_name).is_file():
            (folder / file_name).write_bytes((MODEL / file_name).read_bytes())
    return folder


def make_spec(folder: Path, model: Path, **changes: Any) -> JobSpec:
    (folder / "in").mkdir()
    pq.write_table(pa.table({"text": ["a", "b"]}), folder / "in" / "a.parquet")
    fields = {
        "name": "test",
        "input": {"uri": str(folder / "in")},
        "model": {"id": str(model), "bits": 16},
        "prompt": {"template": "{{ text }}", "format": "text"},
        "output": {"uri": str(folder / "out")},
    }
    return JobSpec.model_validate(fields | changes)


def test_a_job_that_no_card_of_the_cluster_holds_is_refused(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, hollow_model(tmp_path / "model", "Mistral Small 24B"))
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    env |= {"RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", SCRIPT, spec.model_dump_json()]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=120, env=env
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cards"] == ["A100", "L4"]
    assert found["problem"].startswith(f"on L4, a card of the cluster: {spec.model.id} at 16 bits")
    assert found["hint"].startswith("model.bits 4 fits")
    # Nobody waited for a card, and nothing was answered.
    assert found["free"] == 1
    # And the output is nobody's, so that the hint can be followed.
    assert not list((tmp_path / "out").rglob("job.json"))
