"""Engines of other packages over the same rows, where they are installed.

    python -m pip install --no-deps --target DIR ctranslate2
    python -m pip install --no-deps --target DIR onnxruntime-genai onnxruntime onnx onnx-ir \
        flatbuffers protobuf ml-dtypes sympy
    PYTHONPATH=DIR python jobs/bench.py peers

Both convert the model from its folder and need no hub. Neither has a budget for each row:

- CTranslate2 (4.8) calls a function for each token that can end a row, and drops rows that have
  ended from its batch. It sorts the rows by length and divides them into batches itself.
- onnxruntime-genai (0.18) runs a batch until all of it is done. Rows are sorted and divided as for
  `generate`, a batch runs to its longest budget, and only a row's own budget counts. (Its engine
  for continuous batching wants paged attention, which it builds for CUDA only.)

In 8 and 4 bits their answers are not those of float32, nor are ours: the counts of equal rows tell.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jobs.enginebench.contenders import Answer, Answered, Contender, batches
from jobs.enginebench.model import Loaded
from jobs.enginebench.workload import MAX_BUDGET, Row, Tokens

PACKAGES = ("ctranslate2", "onnxruntime_genai")


def not_installed() -> list[str]:
    """Return the packages that can't be imported here."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def installed(loaded: Loaded, folder: Path, threads: int) -> list[Contender]:
    """Return the contenders of the packages that can be imported here."""
    found: list[Contender] = []
    if "ctranslate2" not in not_installed():
        found += [
            CTranslate2(loaded, folder, kind, size, threads)
            for kind in ("float32", "int8")
            for size in (8, 32)
        ]
    if "onnxruntime_genai" not in not_installed():
        found += [
            OnnxGenai(loaded, folder, kind, size, threads)
            for kind in ("fp32", "int4")
            for size in (8, 32)
        ]
    return found


@dataclass(frozen=True)
class CTranslate2:
    """CTranslate2's generator.

    Args:
        folder: The model's; what is converted goes beside it.
        kind: `float32` or `int8`.
    """

    loaded: Loaded
    folder: Path
    kind: str
    batch_size: int
    threads: int

    @property
    def name(self) -> str:
        """See `Contender`."""
        return f"CTranslate2, {self.kind}, batch {self.batch_size}"

    @contextlib.contextmanager
    def ready(self) -> Iterator[Answer]:
        """See `Contender`."""
        package: Any = importlib.import_module("ctranslate2")
        generator = package.Generator(
            str(self._converted()),
            device="cpu",
            compute_type="float32" if self.kind == "float32" else "int8_float32",
            inter_threads=1,
            intra_threads=self.threads,
        )
        yield lambda rows: Answered(self._answer(generator, rows), {})

    def _converted(self) -> Path:
        target = self.folder.with_name(f"ctranslate2-{self.kind}")
        if not target.exists():
            converters: Any = importlib.import_module("ctranslate2.converters")
            converter = converters.TransformersConverter(str(self.folder))
            converter.convert(str(target), quantization=self.kind)
            config = json.loads((target / "config.json").read_bytes())
            # It can't read back the null that it writes for a model without such a token (4.8).
            config["bos_token"] = config["bos_token"] or config["eos_token"]
            (target / "config.json").write_text(json.dumps(config))
        return target

    def _answer(self, generator: Any, rows: Sequence[Row]) -> list[Tokens]:
        tokenizer = self.loaded.tokenizer
        first: dict[int, int] = {}

        def is_done(step: Any) -> bool:
            began = first.setdefault(step.batch_id, step.step)
            return bool(step.step - began + 1 >= rows[step.batch_id].budget)

        found = generator.generate_batch(
            [tokenizer.convert_ids_to_tokens(list(row.prompt_ids)) for row in rows],
            max_batch_size=self.batch_size,
            max_length=MAX_BUDGET,
            include_prompt_in_result=False,
            callback=is_done,
        )
        return [tuple(result.sequences_ids[0]) for result in found]


@dataclass(frozen=True)
class OnnxGenai:
    """onnxruntime-genai's generator.

    Args:
        folder: The model's; what is converted goes beside it.
        kind: `fp32` or `int4`.
    """

    loaded: Loaded
    folder: Path
    kind: str
    batch_size: int
    threads: int

    @property
    def name(self) -> str:
        """See `Contender`."""
        return f"onnxruntime-genai, {self.kind}, sorted, batch {self.batch_size}"

    @contextlib.contextmanager
    def ready(self) -> Iterator[Answer]:
        """See `Contender`."""
        package: Any = importlib.import_module("onnxruntime_genai")
        model = package.Model(str(self._converted()))
        yield lambda rows: Answered(self._answer(package, model, rows), {})

    def _converted(self) -> Path:
        target = self.folder.with_name(f"onnx-{self.kind}")
        if not target.exists():
            # fmt: off
            command = [
                sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "local",
                "-i", str(self.folder), "-o", str(target), "-p", self.kind, "-e", "cpu",
                "-c", str(target.with_suffix(".cache")),
            ]
            # fmt: on
            offline = os.environ | {"HF_HUB_OFFLINE": "1"}
            subprocess.run(command, env=offline, check=True, capture_output=True)
        config = json.loads((target / "genai_config.json").read_bytes())
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = self.threads
        (target / "genai_config.json").write_text(json.dumps(config))
        return target

    def _answer(self, package: Any, model: Any, rows: Sequence[Row]) -> list[Tokens]:
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i].prompt_ids))
        groups = batches([rows[i] for i in order], self.batch_size)
        answers = [answer for group in groups for answer in self._batch(package, model, group)]
        by_row = dict(zip(order, answers, strict=True))
        return [by_row[i] for i in range(len(rows))]

    def _batch(self, package: Any, model: Any, group: Sequence[Row]) -> list[Tokens]:
        longest = max(len(row.prompt_ids) for row in group)
        padding = self.loaded.tokenizer.pad_token_id
        prompts = np.full((len(group), longest), padding, np.int32)
        for place, row in enumerate(group):
            # On the right, as its own tokenizer pads: on the left, answers are wrong (measured).
            prompts[place, : len(row.prompt_ids)] = row.prompt_ids
        options = package.GeneratorParams(model)
        options.set_search_options(
            max_length=longest + max(row.budget for row in group),
            batch_size=len(group),
            do_sample=False,
        )
        generator = package.Generator(model, options)
        generator.append_tokens(prompts)
        while not generator.is_done():
            generator.generate_next_token()
        return [
            tuple(generator.get_sequence(place)[longest : longest + row.budget].tolist())
            for place, row in enumerate(group)
        ]
