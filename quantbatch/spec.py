"""Every option of a job, once: this file is the interface.

A job is one YAML file that validates as `JobSpec`. Each field says its unit, why its default is
what it is, and, by `TUNING`, whether it may change between two runs of one job: a field without
that mark decides the output's bytes, belongs to the job's fingerprint, and a run with another value
is refused. Reading the YAML, `--set` and error messages with line numbers are in `specfile.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from quantbatch import structured
from quantbatch.batchfile import specs
from quantbatch.model import cards
from quantbatch.places import Uri

COMMIT = re.compile(r"[0-9a-f]{40}")

TUNING: dict[str, Any] = {"tuning": True}
"""Mark of a field that changes how a job runs and not what it writes: resume accepts another
value."""


class Section(BaseModel):
    """A part of the spec: frozen, and without room for a field that it does not know."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        # A value may be a secret in the wrong place; specfile shows what it must, without those.
        hide_input_in_errors=True,
    )


class Storage(Section):
    """How to reach an S3 store. Credentials come from the environment, as for every AWS tool, never
    from here.
    """

    endpoint_url: Annotated[Uri, Field(pattern=r"^https?://[^/\s]+")] | None = Field(
        None, json_schema_extra=TUNING
    )
    """Address of an S3-compatible store; null is AWS."""
    region: str | None = Field(None, json_schema_extra=TUNING)
    """Region of the bucket; null takes it from the environment."""
    anonymous: bool = Field(False, json_schema_extra=TUNING)
    """Send unsigned requests, for public buckets."""


class Input(Section):
    """Where the rows come from."""

    uri: Uri | Annotated[list[Uri], Field(min_length=1)]
    """A file, a glob, a folder (read with all its sub-folders; `day=2026-01-01` in a path becomes a
    column `day`) or a list of those; a local path or s3://bucket/key."""
    format: Literal["auto", "parquet", "jsonl", "csv", "openai-batch"] = "auto"
    """Format of the files; `auto` goes by the ending: .parquet, .jsonl, .ndjson, .csv, also with
    .gz or .zst. `openai-batch` are the requests that hosted APIs take in batches, one on a line
    ({custom_id, method, url, body}), for /v1/chat/completions, /v1/completions and /v1/embeddings.
    The key is then `custom_id`, the task `openai`, and there is no prompt, but for
    `chat_template_kwargs`. What a body says goes before `sampling`, whose temperature is 1 then
    unless it is set. An option that can't be honoured is an error of its row. All rows are answered
    by `model`, whatever model they name."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    """The character between two fields of a CSV file."""
    key: str | None = None
    """Column that names each row uniquely and becomes its row_id; null: file and row number."""
    rows_per_chunk: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", json_schema_extra=TUNING
    )
    """Rows that are scheduled, retried and committed together; frozen when the job is first
    planned. `auto` is 64 to 2,048, so that a small job still has chunks for every replica: after a
    crash at most this many rows for each chunk in flight are computed again."""
    storage: Storage = Storage()


class Int8(Section):
    """LLM.int8() of bitsandbytes (arXiv 2208.07339): 8.4 bits a parameter on a 32B model."""

    kind: Literal["int8"] = "int8"
    threshold: Annotated[float, Field(ge=0)] = 6.0
    """Activations beyond this value are multiplied in 16 bits. 6 is the paper's value and quality
    needs it (0 raised the perplexity of a 13B model by a third), but results then depend slightly
    on batch mates."""
    skip_modules: list[str] = []
    """Names of linear layers to leave in 16 bits, besides the library's own list (lm_head)."""


class FourBit(Section):
    """4-bit weights of bitsandbytes (QLoRA, arXiv 2305.14314): 4.7 bits a parameter on a 32B
    model.
    """

    kind: Literal["nf4", "fp4"] = "nf4"
    """nf4 is better than fp4 at the same size (KL divergence 1.6 times smaller in our
    measurements)."""
    double_quant: bool = True
    """Quantize the quantization constants too: 0.37 bits a parameter less at no measurable loss."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type that weights are expanded to for multiplying; `auto` is bfloat16 where the hardware has
    it (Ampere and later, CPUs with AVX512-BF16), else float32 on a CPU and float16 on a card."""
    storage_dtype: Literal["uint8", "bfloat16", "float16", "float32"] = Field(
        "uint8", json_schema_extra=TUNING
    )
    """Type that the codes are packed into; it changes neither their size nor any answer."""
    skip_modules: list[str] = []
    """Names of linear layers to leave in 16 bits, besides the library's own list (lm_head)."""


class Unquantized(Section):
    """Weights as they are in the checkpoint, in the type that `model.dtype` says."""

    kind: Literal["none"] = "none"


Quantization = Annotated[Unquantized | Int8 | FourBit, Field(discriminator="kind")]


class Model(Section):
    """Which model, and in how many bits."""

    id: Uri
    """A folder, a GGUF file, or the name of a Hugging Face repository."""
    revision: str | None = None
    """Commit, tag or branch of a repository; the commit that it stands for is recorded. Pin a
    commit for anything that runs on a schedule."""
    file: str | None = None
    """A GGUF file in the folder or repository, such as model-q4_k_m.gguf; null: safetensors."""
    bits: Literal[4, 8, 16, 32, "auto"] | None = None
    """Short form: 4 is nf4 with double quantization, 8 is int8 with threshold 6, 16 the
    checkpoint's own 16-bit type, 32 float32. `auto` is the widest of 16, 8 and 4 that fits the card
    with a useful batch: 8 rows, or batch_size, as long as 95 % of the prompts. It is chosen when
    the job is first planned, and stays."""
    quantization: Quantization | None = None
    """Long form, for options other than those that `bits` stands for."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Type of the weights that are not quantized; `auto` is the checkpoint's own."""
    allow_dequantize: bool = False
    """Load a checkpoint in a format that is expanded to 16 bits here, though it then takes as much
    memory as the original."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a repository. It can do all that you can; so `revision`
    has to pin the commit that you read."""
    cache: Uri | None = Field(None, min_length=1, json_schema_extra=TUNING)
    """A folder, local or s3://, that keeps quantized weights: the first replica quantizes, later
    ones and other jobs load a third of the bytes."""
    cache_storage: Storage = Storage()

    @model_validator(mode="after")
    def _remote_code_is_pinned(self) -> Self:
        if self.trust_remote_code and not COMMIT.fullmatch(self.revision or ""):
            raise ValueError(
                "trust_remote_code runs code of a repository: pin it, with model.revision as a"
                " commit of 40 hexadecimal digits"
            )
        return self

    @model_validator(mode="after")
    def _bits_and_quantization_agree(self) -> Self:
        if self.bits is not None and self.quantization is not None:
            raise ValueError("give either bits or quantization, not both")
        if self.bits == 32 and self.dtype not in ("auto", "float32"):
            raise ValueError(f"bits 32 is float32, but dtype is {self.dtype}")
        if self.bits == 16 and self.dtype == "float32":
            raise ValueError("bits 16 is a 16-bit type, but dtype is float32")
        return self

    def seen_from(self, folder: str) -> Model:
        """Return the model as another process finds it.

        Args:
            folder: Where `id`, if it is a path that does not exist from here, and a local `cache`
                are relative to.
        """
        changes = {}
        there = Path(folder, self.id)
        if not Path(self.id).expanduser().exists() and there.exists():
            changes["id"] = str(there)
        if self.cache and "://" not in self.cache and not self.cache.startswith("~"):
            changes["cache"] = str(Path(folder, self.cache))
        return self.model_copy(update=changes)

    def resolved(self) -> Model:
        """Return the long form: `quantization` set, `bits` null."""
        if self.quantization is not None:
            return self
        assert self.bits != "auto", "chosen by `preflight`, which knows model and card"
        chosen = {4: FourBit(), 8: Int8()}.get(self.bits or 16, Unquantized())
        dtype = "float32" if self.bits == 32 else self.dtype
        return self.model_copy(update={"quantization": chosen, "bits": None, "dtype": dtype})


class Message(Section):
    """One message of a conversation, as a template."""

    role: str
    content: str
    """A Jinja template over the row's columns."""


class Prompt(Section):
    """How a row becomes a prompt: exactly one of `template`, `messages` and `column`."""

    template: str | None = None
    """A Jinja template over the row's columns; in the format `chat` it is one user message."""
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    """A conversation of templates."""
    column: str | None = None
    """A column that already holds messages ({role, content} structs) or, as a string, the
    prompt."""
    format: Literal["chat", "text"] = "chat"
    """`chat` applies the model's chat template; `text` sends the prompt as it is, for base
    models."""
    chat_template_kwargs: dict[str, bool | int | float | str | None] = {}
    """Arguments for the model's chat template, such as enable_thinking."""

    @model_validator(mode="after")
    def _exactly_one_source(self) -> Self:
        given = [
            name for name in ("template", "messages", "column") if getattr(self, name) is not None
        ]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"give exactly one of template, messages and column, not {found}")
        if self.format == "text" and self.messages is not None:
            raise ValueError("messages need the format chat; use template for the format text")
        return self


class Response(Section):
    """The form of the answer: no token that does not fit is ever chosen, and the text is checked
    again when it is done. Exactly one of the five.
    """

    json_schema: dict[str, Any] | str | None = None
    """A JSON schema, as a mapping or as JSON. Say `additionalProperties: false`, `maxLength` and
    `maxItems`, or a model may go on until max_new_tokens."""
    schema_column: str | None = None
    """A column that holds each row's own JSON schema, as JSON."""
    regex: str | None = None
    """A regular expression that the whole answer matches: that of Rust, without look-around and
    back references."""
    choices: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None = None
    """The answers that there are."""
    grammar: str | None = None
    """A context-free grammar in the variant of Lark that llguidance reads."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        names = ("json_schema", "schema_column", "regex", "choices", "grammar")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"give exactly one of {', '.join(names)}, not {found}")
        if self.choices is not None and len(set(self.choices)) < len(self.choices):
            raise ValueError("choices: one comes twice")
        return self

    @field_validator("json_schema")
    @classmethod
    def _schema_as_text(cls, value: dict[str, Any] | str | None) -> str | None:
        # As text, the order of properties, which answers keep, is part of the fingerprint.
        return None if value is None else structured.schema_text(value)


class Generate(Section):
    """Text: the completion as it comes, or of the form that `response` gives."""

    kind: Literal["generate"] = "generate"
    response: Response | None = None
    """The form of the answer; null leaves it free. An answer that is cut off has the status
    `truncated`, one that has another form all the same `invalid`, with the reason."""
    tools: list[dict[str, Any]] = []
    """Tools that the model is told of, as its chat template takes them: {type: function, function:
    {name, description, parameters}}. Adds `tool_calls`, the calls in the answer: name, and
    arguments as JSON text. It is null where the model's way of writing them is not known (known
    are those of Qwen and Hermes, Llama 3.1, and Mistral), and for calls that are none, which are
    `invalid`."""
    tools_column: str | None = None
    """A column with each row's own tools, instead of `tools`: a JSON text of a list of them. Null
    is none; what is no list of functions makes a row an error row."""
    tool_choice: Annotated[str, Field(min_length=1)] = "auto"
    """`auto` leaves it to the model whether it calls a tool; with `required` the answer consists of
    one call or more and nothing else, with the name of a function of one call of it, and the
    arguments follow its `parameters`. Only for models that write calls as Qwen and Hermes or Llama
    3.1 do."""

    @property
    def calls_tools(self) -> bool:
        """Whether rows have tools."""
        return bool(self.tools) or self.tools_column is not None

    @model_validator(mode="after")
    def _tools_come_from_one_place(self) -> Self:
        if self.calls_tools and self.response is not None:
            raise ValueError("give either response or tools: an answer of a form calls no tool")
        if self.tools and self.tools_column is not None:
            raise ValueError("give either tools or tools_column")
        if self.tool_choice != "auto" and not self.calls_tools:
            raise ValueError("tool_choice needs tools or tools_column")
        json.dumps(self.tools, allow_nan=False)
        return self


class BatchRequests(Section):
    """What each row of a batch file says itself: the task of the input format `openai-batch`. Adds
    `response`, the body of the response as JSON text.
    """

    kind: Literal["openai"] = "openai"
    pooling: Literal["last", "mean"] = "last"
    """What becomes the vector of a text in /v1/embeddings: the hidden state of its last token, or
    the mean of all. Vectors have the length 1."""


class MultiLabel(Section):
    """Every label that applies, instead of the one that fits best: a yes or no question for each,
    all of them after the same prompt, which is computed once.
    """

    question: str = "{label}: "
    """What is put between the prompt and yes or no; `{label}` stands for the label."""
    yes: Annotated[str, Field(min_length=1)] = "yes"
    no: Annotated[str, Field(min_length=1)] = "no"
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """A label applies whose yes has at least this probability, beside no."""

    def asked(self, label: str) -> tuple[str, str]:
        """Return what follows the prompt if a label applies, and if it does not."""
        question = self.question.replace("{label}", label)
        return question + self.yes, question + self.no

    @model_validator(mode="after")
    def _question_names_the_label(self) -> Self:
        if "{label}" not in self.question:
            raise ValueError("question lacks {label}, so it is the same for all labels")
        if plain_label(self.yes) == plain_label(self.no):
            raise ValueError("yes and no are the same")
        return self


class Classify(Section):
    """One of some labels, or several, by their log-likelihood after the prompt: always one of those
    allowed, with its probability, for one pass over the prompt. `sampling` is not used.

    Columns: `label` (a list with `multi_label`), `probabilities` (a struct with a field for each
    label; with `labels_column` a list of {label, probability}), `margin` (between the two likeliest
    labels; with `multi_label` that of the least sure one, see `min_margin`) and `entropy` (in
    nats; with `multi_label` that of all questions together).
    """

    kind: Literal["classify"] = "classify"
    labels: list[str] | dict[str, Annotated[list[str], Field(min_length=1)] | str] | None = None
    """A list of labels, or of each label the words that stand for it: {billing: [billing,
    invoice]}, whose probabilities add up."""
    labels_column: str | None = None
    """A column that holds a list of each row's own labels, instead of `labels`. A row with a
    single one is an error row, for there is nothing to choose, unless `multi_label` asks."""
    max_label_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest label of `labels_column`, in tokens: a prompt leaves that much room."""
    before: str = ""
    """What comes between prompt and label, such as a space. A template can't end with a space; in
    the format `text` labels of most models begin with one."""
    normalization: Literal["none", "tokens", "bytes"] = "none"
    """What a log-likelihood is divided by before labels are compared. `none` is the model's own
    probability and favours short labels where the wording of labels is the prompt's guess; `bytes`
    is acc_norm of lm-evaluation-harness."""
    end: Literal["auto", "always", "never"] = "auto"
    """Whether the end of the answer belongs to a label. `auto` adds it to all labels of a row if
    one begins with the tokens of another (`good`, `good enough`): the shorter would always be at
    least as likely. Without such labels it costs time and says little."""
    prior_correction: bool = False
    """Divide by what the labels have after the same template with empty columns (contextual
    calibration, arXiv 2102.09690), against a model's liking for certain labels."""
    min_margin: Annotated[float, Field(ge=0, le=1)] | None = None
    """With a smaller margin a row has the status `invalid` and no label, but its probabilities;
    such rows count for limits.max_error_rate. With `multi_label` a margin is how far a yes is from
    `threshold`: 0 there, 1 at a probability of 0 or 1."""
    multi_label: MultiLabel | None = None

    @property
    def spoken(self) -> dict[str, list[str]]:
        """The words of each label of `labels`."""
        if not isinstance(self.labels, dict):
            return {label: [label] for label in self.labels or ()}
        return {
            label: [words] if isinstance(words, str) else words
            for label, words in self.labels.items()
        }

    @model_validator(mode="after")
    def _one_source_of_labels(self) -> Self:
        if (self.labels is None) == (self.labels_column is None):
            raise ValueError("give either labels or labels_column")
        if self.labels is None:
            return self
        least = 1 if self.multi_label else 2
        if len(self.labels) < least:
            raise ValueError(f"labels: there are {len(self.labels)}, and it takes at least {least}")
        return self

    @model_validator(mode="after")
    def _labels_differ(self) -> Self:
        names = self.labels or ()
        words = [word for spoken in self.spoken.values() for word in spoken]
        for what, texts in (("label", list(names)), ("wording", words)):
            if any(not plain_label(text) for text in texts):
                raise ValueError(f"labels: a {what} is empty")
            if twice := _first_twice(texts):
                raise ValueError(f"labels: the {what} {twice!r} is there twice")
        return self

    @model_validator(mode="after")
    def _questions_have_one_wording(self) -> Self:
        if self.multi_label and isinstance(self.labels, dict):
            raise ValueError("multi_label asks for each label by its name: give a list of labels")
        if self.multi_label and self.normalization != "none":
            raise ValueError("multi_label compares a yes with its no, so it takes no normalization")
        return self

    @property
    def answer_tokens(self) -> int:
        """The most tokens that follow a prompt; no tokenizer makes more than one of a byte, and one
        for the beginning.
        """
        if self.labels is None:
            return self.max_label_tokens + 1
        texts = [word for words in self.spoken.values() for word in words]
        if self.multi_label:
            texts = [text for label in texts for text in self.multi_label.asked(label)]
        return max(len((self.before + text).encode()) for text in texts) + 2


class Score(Section):
    """The log-likelihood of a text that is there already: of a column after the prompt, or of the
    prompt itself. `sampling` is not used.

    Columns: `logprob` (the sum, in nats), `perplexity`, `scored_tokens`, and with `per_token`
    `token_ids` and `token_logprobs`. A token that belongs to both sides of the seam counts for the
    continuation.
    """

    kind: Literal["score"] = "score"
    continuation: str | None = None
    """A column with the text after the prompt; null scores the prompt, but for its first token,
    which nothing comes before (in the format `text` that is the tokenizer's own, if it has one)."""
    before: str = ""
    """What comes between prompt and continuation, such as a space; it is scored too."""
    per_token: bool = False
    """Give each token with its log-probability."""


class Embed(Section):
    """The hidden state of the last layer as a vector. `sampling` is not used.

    Column: `embedding`, a list of fixed size.
    """

    kind: Literal["embed"] = "embed"
    pooling: Literal["last", "mean"] = "last"
    """`last` takes the state of the last token, as decoders trained for embedding want it, `mean`
    the mean over all tokens."""
    normalize: bool = True
    """Scale to length 1, so that a dot product is the cosine."""
    dtype: Literal["float32", "float16"] = "float32"
    """Type of the numbers; float16 is half the size, at 3 digits."""
    dimensions: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Keep this many of the first numbers, for models that were trained for it (arXiv 2205.13147);
    `auto` is the model's hidden size."""


def plain_label(text: str) -> str:
    """Return what remains of a label to tell it from others."""
    return unicodedata.normalize("NFC", text).strip()


def _first_twice(texts: list[str]) -> str | None:
    plain = [plain_label(text) for text in texts]
    return next((text for i, text in enumerate(plain) if text in plain[:i]), None)


Task = Annotated[Generate | Classify | Score | Embed | BatchRequests, Field(discriminator="kind")]
"""What is asked of each row."""

TokenKey = Annotated[int, Field(ge=0, strict=False)]
"""A token id as the key of a mapping: JSON makes texts of keys, and a spec goes through JSON."""


class Sampling(Section):
    """How tokens are chosen. Every field counts: a model's generation_config.json changes none of
    them. What changes scores comes in this order: what `task.response` does not allow; logit_bias;
    repetition_penalty; presence_penalty and frequency_penalty; bad_words; min_new_tokens; then,
    above temperature 0, temperature, top_k, top_p, min_p, and the draw by the row's seed.
    """

    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Longest answer in tokens; a longer one is cut and has the status `truncated`."""
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """The answer can't end before this many tokens."""
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.0
    """0 takes the likeliest token each time (greedy), which is what labeling wants."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens that together have this probability; 1 is off."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from this many likeliest tokens; 0 is off."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Sample only from tokens that are at least this share as likely as the likeliest
    (arXiv 2407.01082); 0 is off."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Divides the scores of tokens already seen, in prompt or answer (arXiv 1909.05858); 1 is
    off."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Taken off the score of each token that the answer holds already, once; 0 is off."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """Taken off the score of a token as often as the answer holds it already; 0 is off."""
    logit_bias: dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]] = {}
    """Added to the scores of tokens, by token id; -100 as good as forbids one."""
    bad_words: list[Annotated[str, Field(min_length=1)]] = []
    """Words that the answer must not hold, as the tokenizer writes them at a beginning and after a
    space; a word that it can also put together from other tokens is not found."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Strings that end the answer; the answer is cut before them."""
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = []
    """Tokens that end the answer, besides the model's own; they are no part of its text."""
    n: Annotated[int, Field(ge=1, le=256)] = 1
    """Answers to each row, each with a seed of its own; with more than one, `completion` and its
    companions are lists."""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Give the log-probability of each generated token, and of this many likeliest tokens beside
    it; null is off. They are the model's own, before temperature and penalties."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the job; each row's own seed is derived from this one and its row_id. A row's samples
    are the same in any company, up to ties that the rounding of floating-point numbers decides."""

    @property
    def counts_tokens(self) -> bool:
        """Whether a token's score depends on how often it came before."""
        penalties = self.presence_penalty, self.frequency_penalty
        return self.repetition_penalty != 1 or any(penalties)

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is taken each time, and nothing else is asked."""
        changed = self.counts_tokens or self.logit_bias or self.bad_words or self.min_new_tokens
        return self.temperature == 0 and self.logprobs is None and not changed

    @model_validator(mode="after")
    def _min_within_max(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens is above max_new_tokens, {self.max_new_tokens}")
        return self

    @model_validator(mode="after")
    def _several_answers_differ(self) -> Self:
        if self.n > 1 and self.temperature == 0:
            raise ValueError("n is above 1, but at temperature 0 all answers are the same")
        return self


class ModelEngine(Section):
    """What engines with a model have in common."""

    max_input_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Longest prompt in tokens; `auto` is the model's context less max_new_tokens, at most 8,192,
    because the card must have room for the longest prompt that is let in."""
    too_long: Literal["error", "truncate_left", "truncate_right"] = "error"
    """What becomes of a longer prompt: an error row, or cut on the left (keeps its end, with the
    template's generation prompt) or on the right (keeps its beginning)."""
    deduplicate: bool = Field(True, json_schema_extra=TUNING)
    """Answer equal prompts once, where the answer is certain (temperature 0, labels, scores,
    vectors): within a replica, and, where they are more than one in a hundred, also across replicas
    and continued runs, by answers that are kept beside the output until the job is done."""


class ContinuousEngine(ModelEngine):
    """A running batch that rows enter and leave at every step, with a paged KV cache. A model that
    can't run like that is answered by the static engine, and the log says so.
    """

    kind: Literal["continuous"] = "continuous"
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", json_schema_extra=TUNING
    )
    """Most rows that are decoded together; `auto` is what the memory plan has room for on a card,
    and measured for a few seconds on a CPU."""
    step_tokens: Literal["auto"] | Annotated[int, Field(ge=16)] = Field(
        "auto", json_schema_extra=TUNING
    )
    """Most tokens computed in one step, long prompts in pieces; `auto` is 2,048 on a card, where
    large steps pay for expanding quantized weights, and 512 on a CPU."""
    share_prefixes: bool = Field(True, json_schema_extra=TUNING)
    """Compute the common beginning of prompts once, in blocks of 16 tokens."""
    fused_4bit: bool = Field(True, json_schema_extra=TUNING)
    """On a card, multiply few rows by 4-bit weights without expanding them in memory, where that is
    found to be right and faster as the model is loaded. Sums then come in another order, as they do
    with another batch_size."""


class StaticEngine(ModelEngine):
    """Plain `generate` of transformers over groups of rows of similar length: slower, and the
    measure of the other.
    """

    kind: Literal["static"] = "static"
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", json_schema_extra=TUNING
    )
    """Rows that run at once; `auto` is what the memory plan has room for."""
    fused_4bit: bool = Field(True, json_schema_extra=TUNING)
    """As for the continuous engine."""


class LlamaCppEngine(ModelEngine):
    """llama.cpp, for a GGUF file in the bits that it has: nothing is expanded. It needs the extra
    `quantbatch[llama-cpp]`, whose package is compiled as it is installed.
    """

    kind: Literal["llama_cpp"] = "llama_cpp"
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = Field(
        "auto", json_schema_extra=TUNING
    )
    """Most rows that are decoded together; `auto` is 16, or as many as fit the card. Each has room
    in the cache for the longest prompt and answer."""
    step_tokens: Literal["auto"] | Annotated[int, Field(ge=16)] = Field(
        "auto", json_schema_extra=TUNING
    )
    """Most tokens computed in one step, long prompts in pieces; `auto` is 512."""


class EchoEngine(Section):
    """No model at all: answers each prompt with the beginning of its own tokens. For trying out
    everything around a model, and for measuring it. It keeps to no form: with `task.response` or
    `task.tool_choice` its answers are `invalid`.
    """

    kind: Literal["echo"] = "echo"
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", json_schema_extra=TUNING
    )
    """Rows that are answered in one step; `auto` is 1,024."""
    max_input_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Longest prompt in tokens; `auto` is as for the static engine."""
    too_long: Literal["error", "truncate_left", "truncate_right"] = "error"
    """What becomes of a longer prompt."""
    step_s: Annotated[float, Field(ge=0)] = Field(0.0, json_schema_extra=TUNING)
    """Time that a step takes, in seconds: makes a rehearsal last as long as the real job."""


Engine = Annotated[
    ContinuousEngine | StaticEngine | LlamaCppEngine | EchoEngine, Field(discriminator="kind")
]


class ReplicaRange(Section):
    """A pool that grows with the work."""

    min: Annotated[int, Field(ge=1)] = 1
    max: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class Cluster(Section):
    """Where the job runs."""

    replicas: Annotated[int, Field(ge=1)] | ReplicaRange = Field(1, json_schema_extra=TUNING)
    """Copies of the model: a number, or {min, max} to grow with the work."""
    gpus_per_replica: Annotated[float, Field(ge=0)] = Field(1, json_schema_extra=TUNING)
    """Cards of one replica: 1, a fraction to share a card, or 0 to run on CPUs. Over 2 and more the
    layers of a model that fits no single card are spread; that gives room and no speed."""
    gpu_memory_gib: Annotated[float, Field(gt=0)] | None = Field(None, json_schema_extra=TUNING)
    """Memory of one card in GiB as torch reports it, for planning without one: a card sold as 24 GB
    has about 23.6, an L4 or A10G about 22. Null: each replica asks its card, and the plan gives no
    verdict."""
    card: str | None = Field(None, json_schema_extra=TUNING)
    """Name of the card, such as RTX 4090 or L4, instead of `gpu_memory_gib`; `quantbatch plan
    --card` plans for another one."""
    cpus_per_replica: Annotated[float, Field(gt=0)] = Field(1, json_schema_extra=TUNING)
    """CPU cores that one replica takes when it runs without a card."""
    cpu_fallback: bool = Field(False, json_schema_extra=TUNING)
    """Run on CPUs when the cluster has no card. Off, because a large model on CPUs seems to
    hang."""
    address: Uri | None = Field(None, json_schema_extra=TUNING)
    """Ray cluster to join; null: the one that RAY_ADDRESS or the surrounding Ray job names, else
    one started on this machine for the run."""
    chunks_in_flight: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", json_schema_extra=TUNING
    )
    """Chunks that a replica works on at once, so that its batch stays full across their ends;
    `auto` is as many as hold 1,024 rows, and at most half of a replica's share of the job, so that
    the last chunks go to whichever replica is free."""

    @field_validator("card")
    @classmethod
    def _card_is_known(cls, value: str | None) -> str | None:
        if value is not None:
            cards.find(value)
        return value

    @model_validator(mode="after")
    def _whole_cards(self) -> Self:
        if self.gpus_per_replica > 1 and self.gpus_per_replica % 1:
            raise ValueError(
                f"gpus_per_replica is {self.gpus_per_replica:g}: several cards are whole cards, and"
                " only a part of one can be shared"
            )
        return self

    @model_validator(mode="after")
    def _one_size_of_card(self) -> Self:
        if self.card is not None and self.gpu_memory_gib is not None:
            raise ValueError("give either card or gpu_memory_gib, not both")
        return self


class Output(Section):
    """Where the answers go, and in what form."""

    uri: Uri
    """A folder: a local path or s3://bucket/prefix."""
    format: Literal["parquet", "openai-batch"] = "parquet"
    """Format of the files. `openai-batch`, which is usual for input of that format and for no
    other, are lines {id, custom_id, response, error} in part-000000.jsonl, and those of requests
    that failed in part-000000.errors.jsonl."""
    keep: Literal["all"] | list[str] = "all"
    """Input columns to carry into the output."""
    prefix: str = ""
    """Put before the names of the columns that quantbatch adds (row_id, status, completion, ...),
    for input that has columns of those names."""
    compression: Literal["zstd", "snappy", "none"] = "zstd"
    """Compression of the Parquet files; zstd is about a third smaller than snappy on text."""
    explode: bool = False
    """Give each field of a flat `task.response.json_schema` a column of its own: text, integer,
    number, boolean, an enum of those, or a list of one of them. Null where there is no valid
    answer."""
    rows_per_part: Annotated[int, Field(ge=1)] = 100_000
    """Most rows of one output file. At 1 kB of text a row that is about 30 MB on disk."""
    storage: Storage = Storage()


class AnswersCache(Section):
    """Answers that are kept across jobs: a request that was answered before, by the same model in
    the same bits with the same settings, takes the answer from here. Only where the answer is
    certain: at temperature 0, and where labels or texts are scored. The output then has a column
    `cached` that is true for rows whose answers were there. A cache that is damaged or can't be
    reached costs time and no job; nothing in it is ever removed but what was packed into larger
    files, and its folder may be removed whenever no job runs.
    """

    uri: Uri = Field(json_schema_extra=TUNING)
    """A folder, local or s3://, on which all replicas look."""
    storage: Storage = Storage()


class Limits(Section):
    """When to give up."""

    max_error_rate: Annotated[float, Field(ge=0, le=1)] = Field(0.01, json_schema_extra=TUNING)
    """Share of rows that may end as `error` or `invalid`; beyond it the finished job exits with
    1."""
    attempts: Annotated[int, Field(ge=1)] = Field(3, json_schema_extra=TUNING)
    """How often replicas may die in a row, without finishing a chunk or while they load, before
    no chunk is given to them any more; and how many rows of one chunk may kill a replica before the
    rest of it is given up."""
    step_timeout_s: Annotated[float, Field(gt=0)] = Field(600.0, json_schema_extra=TUNING)
    """Longest time in seconds that a step of the engine may take. A replica that hangs longer is
    ended, and the row that does it becomes an error row. The first step on a card compiles kernels;
    600 is far beyond that."""
    load_timeout_s: Annotated[float, Field(gt=0)] = Field(3600.0, json_schema_extra=TUNING)
    """Longest time in seconds that a replica may take to load its model, with the time in which
    others of its node load. One that hangs longer, in a driver or in a network's disk, is ended;
    `attempts` says how often another one tries."""
    drain_s: Annotated[float, Field(ge=0)] = Field(25.0, json_schema_extra=TUNING)
    """Time in seconds that chunks under way have to finish when a run is told to stop (SIGTERM or
    Ctrl-C; a second one ends it at once). Kubernetes gives 30 before it kills, a spot instance of
    AWS 120, `ray job stop` what RAY_JOB_STOP_WAIT_TIME_S says, or 3."""


class JobSpec(Section):
    """A batch job: rows in, a prompt for each, a quantized model, answers out."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = Field(
        json_schema_extra=TUNING
    )
    """Name of the job in logs and reports: letters, digits, dot, dash and underscore, at most
    63."""
    input: Input
    model: Model
    prompt: Prompt
    task: Task = Generate()
    sampling: Sampling = Sampling()
    engine: Engine = ContinuousEngine()
    cluster: Cluster = Cluster()
    output: Output
    answers_cache: AnswersCache | None = None
    """Where answers are kept for later jobs; null keeps none. (`model.cache` is for weights.)"""
    limits: Limits = Limits()

    @model_validator(mode="before")
    @classmethod
    def _usual_kinds(cls, data: Any) -> Any:  # noqa: ANN401 - whatever the YAML holds
        """Let `engine` and `task` be set without saying which, if it is the usual one."""
        for name, kind in (("engine", "continuous"), ("task", "generate")):
            if isinstance(data, dict) and isinstance(section := data.get(name), dict):
                data = data | {name: {"kind": kind} | section}
        return data

    @model_validator(mode="before")
    @classmethod
    def _usual_for_a_batch_file(cls, data: Any) -> Any:  # noqa: ANN401 - whatever the YAML holds
        """Fill in what follows from an input of requests, where nothing else is said."""
        if not isinstance(data, dict) or not isinstance(given := data.get("input"), dict):
            return data
        return specs.filled_in(data) if given.get("format") == specs.BATCH_FILE else data

    @model_validator(mode="after")
    def _all_of_it_is_a_batch_file(self) -> Self:
        specs.check(self)
        return self

    @model_validator(mode="after")
    def _task_and_rest_agree(self) -> Self:
        reads = isinstance(self.task, Classify | Score | Embed)
        if reads and self.engine.kind == "llama_cpp":
            raise ValueError(
                f"task {self.task.kind}: the engine llama_cpp only generates; use the engine"
                " continuous or static, with safetensors"
            )
        if reads and self.sampling.n > 1:
            raise ValueError(f"sampling.n is above 1, but task {self.task.kind} samples nothing")
        if getattr(self.task, "prior_correction", False) and self.prompt.column is not None:
            raise ValueError(
                "task.prior_correction asks the same template without a row, and prompt.column has"
                " no template"
            )
        ends = isinstance(self.task, Classify) or (
            isinstance(self.task, Score) and self.task.continuation is not None
        )
        if ends and self.prompt.format == "text" and self.engine.too_long == "truncate_right":
            raise ValueError(
                "engine.too_long truncate_right would cut the end of the prompt, which task"
                f" {self.task.kind} continues: use truncate_left, or the format chat"
            )
        return self

    @property
    def answer_tokens(self) -> int:
        """The most tokens that follow a prompt."""
        match self.task:
            case Generate() | BatchRequests():
                return self.sampling.max_new_tokens
            case Classify() as task:
                return task.answer_tokens
            case Score() | Embed():
                return 0

    def resolved(self) -> JobSpec:
        """Return the spec with its short forms written out, as it is logged, saved and
        fingerprinted.
        """
        return self.model_copy(update={"model": self.model.resolved()})

    def deciding(self) -> dict[str, Any]:
        """Return the fields that decide the output's bytes, by dotted path, in JSON types."""
        found = _deciding(self.resolved(), "")
        found.pop("answers_cache", None)
        if self.answers_cache is not None:
            found["answers_cache"] = True  # wherever it is, it adds a column
        return found

    def fingerprint(self, **others: str) -> str:
        """Return the SHA-256 of the deciding fields in canonical JSON, as hex.

        Args:
            others: What else decides the output, such as the digest of the model.
        """
        document = json.dumps(self.deciding() | others, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(document.encode()).hexdigest()


def _deciding(section: Section, prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, info in type(section).model_fields.items():
        extra = info.json_schema_extra
        if isinstance(extra, dict) and extra.get("tuning"):
            continue
        value = getattr(section, name)
        if isinstance(value, Section):
            found |= _deciding(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = section.model_dump(mode="json", include={name})[name]
    # Where a job writes is not what it writes: a copied or renamed output folder can be continued.
    found.pop("output.uri", None)
    return found


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a job spec, for editors."""
    schema = JobSpec.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
