"""Chat templates of strangers: bounded, out of Python's reach, and else those of transformers."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from quantbatch import spec
from quantbatch.errors import ModelError, RowError
from quantbatch.prompts import chat_budget, chat_sandbox
from quantbatch.prompts.chat import ChatTemplate
from quantbatch.prompts.chat_sandbox import ChatSandbox
from quantbatch.prompts.sandbox import TEMPLATE_ERRORS

if TYPE_CHECKING:
    from tests.conftest import Count

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be {{ kind }}.\n"},
    {"role": "user", "content": " What is 2*2? <b>%s {0}</b> "},
    {
        "role": "assistant",
        "content": "<think>\nfour\n</think>\n\n4",
        "tool_calls": [
            {"function": {"name": "add", "arguments": {"a": 1, "b": [1.5, None, True]}}}
        ],
    },
    {"role": "tool", "content": '{"a": "ü"}'},
    {"role": "user", "content": "thanks 👋🏽"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds <two>",
            "parameters": {"type": "object", "properties": {"a": {"type": ["integer", "null"]}}},
        },
    }
]
# In the idioms of the templates of Qwen 3, Llama 3.1, Mistral and gpt-oss.
HONEST = {
    "qwen": """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(
            message.content.startswith('<tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index or loop.last %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning.strip('\\n') + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set call = tool_call.function %}
            {{- '<tool_call>{"name": "' ~ call.name ~ '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
        {%- endfor %}
    {%- elif message.role == "tool" and (loop.first or loop.previtem.role != "tool") %}
        {{- '<|im_start|>user\\n<tool_response>\\n' ~ content ~ '\\n</tool_response>' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}{%- endif %}
{%- endif %}""",
    "llama": """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "Today: " + date_string + "\\n\\n" + system_message }}
{%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|h|>' + message['role'] + '<|e|>\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("one call at once") }}{%- endif %}
        {%- for name, value in message.tool_calls[0].function.arguments | items %}
            {{- name + '="' + value | string + '"' }}{%- if not loop.last %}{{- ", " }}{%- endif %}
        {%- endfor %}
    {%- else %}{{- message.content | tojson }}{%- endif %}
{%- endfor %}""",
    "macros": """
{%- macro render(value, depth=0) -%}
    {%- if value is mapping -%}
        {%- for key, each in value|dictsort %}
{{ '  ' * depth }}{{ key | upper }}: {{ render(each, depth + 1) }}
        {%- endfor -%}
    {%- elif value is sequence and value is not string -%}
        [{%- for each in value %}{{ render(each, depth + 1) }}{{ "," if not loop.last }}{%- endfor -%}]
    {%- elif value is none %}null{%- else %}{{ value }}{%- endif -%}
{%- endmacro -%}
{%- for tool in tools %}{{ render(tool) }}{% endfor -%}
{%- set seen = namespace(n=0, text='') %}
{%- for m in messages if m.role in ['user', 'assistant'] recursive -%}
    {%- set seen.n = seen.n + 1 -%}{%- set seen.text = seen.text ~ m['content'] | replace("4", "four") -%}
    {% generation %}{{ m.content.strip().splitlines() | join('|') }}{% endgeneration %}
    {%- if seen.n > 7 %}{%- break %}{%- endif %}
{%- endfor -%}
{{ seen.text | indent(2) }} {{ '%s/%03d' % (seen.n, 7) }} {{ '{:>5}|{x}'.format(1, x='y') }}
{{- messages | map(attribute='role') | join(' ') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{- messages | groupby('role') | map('first') | list }} {{ dict(a=1, b=[2, 'c']) }} {{ 2 ** 10 - 7 // 2 % 3 }}
{{- [1, 2] + [3] * 2 }} {{ 'a' < 'b' }} {{ none }} {{ missing }} {{ (1, 'x') }} {{ 2.5 | round }} {{ range(3) | list }}
{%- set block %}a{{ bos_token }}b{% endset %}{{ block | trim | title }}{{ cycler('a', 'b').next() }}
{%- set sep = joiner(', ') %}{% for x in 'abc' %}{{ sep() }}{{ x }}{% endfor %}
{% macro twice() %}{{ caller(1) }}{{ caller(2) }}{% endmacro %}{%- call(x) twice() %}{{ x }}!{% endcall %}{{ messages[-1].content[:4] }}{{ 'x' is string }}""",
}
VARIABLES: dict[str, Any] = {
    "add_generation_prompt": True,
    "bos_token": "<s>",
    "enable_thinking": False,
}


def render(source: str, messages: Any = MESSAGES, **more: Any) -> str:
    values = {"messages": messages, "tools": None, **more}
    return ChatSandbox().compiled(source).render(values, chars=1000)


@pytest.mark.parametrize(("name", "tools"), [*((name, TOOLS) for name in HONEST), ("qwen", None)])
def test_a_template_makes_what_it_makes_in_transformers(name: str, tools: Any) -> None:
    wanted: Any = render_jinja_template(
        conversations=[MESSAGES], tools=tools, chat_template=HONEST[name], **VARIABLES
    )
    assert render(HONEST[name], tools=tools, **VARIABLES) == wanted[0][0]


def test_reasoning_has_all_its_names() -> None:
    source = (
        "{{ messages[0].thinking }}{{ messages[0].reasoning_content }}{{ messages[0].reasoning }}"
    )
    messages = [{"role": "assistant", "content": "a", "reasoning": "b"}]
    wanted: Any = render_jinja_template(conversations=[messages], chat_template=source)
    assert chat(source).render([messages]) == wanted[0] == ["bbb"]


class _Tokenizer:
    """As much of a tokenizer as a chat template needs."""

    special_tokens_map = {"bos_token": "<s>"}

    def __init__(self, chat_template: str) -> None:
        self.chat_template = chat_template

    def get_chat_template(self) -> str:
        return self.chat_template


def chat(source: str) -> ChatTemplate:
    tokenizer: Any = _Tokenizer(source)
    return ChatTemplate(spec.Prompt(column="chat"), tokenizer)


def grown(start: str, step: str, use: str) -> str:
    """Return a template that does something 99 times, and then uses what came of it."""
    loop = f"{{% for i in range(99) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
    return f"{{% set ns = namespace(x={start}) %}}{loop}{use}"


BOMBS = [
    "{{ 'a' * 10**9 }}",
    "{{ 10**9 * 'a' }}",
    "{{ [1] * 10**9 }}",
    "{{ 9**(9**9) }}",
    "{{ 2**100000 }}",
    grown("7", "ns.x * ns.x", ""),
    grown("'a'", "ns.x + ns.x", ""),
    grown("'a'", "ns.x ~ ns.x", ""),
    grown("[1]", "ns.x + ns.x", ""),
    grown("[1]", "[ns.x, ns.x]", "{{ ns.x }}"),
    grown("[1]", "[ns.x, ns.x]", "{{ ns.x | tojson }}"),
    grown("{}", "{'a': ns.x, 'b': ns.x}", "{{ ns.x | string }}"),
    grown("[1]", "[ns.x, ns.x]", "{{ '%s' % ns.x }}"),
    grown("[1]", "[ns.x, ns.x]", "{{ '{}'.format(ns.x) }}"),
    grown("[1]", "[ns.x, ns.x]", "{{ [ns.x] | join }}"),
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    grown("'a'", "ns.x | replace('a', 'aa')", ""),
    grown("'a'", "ns.x.replace('a', 'aa')", ""),
    grown("'\"'", "ns.x | tojson", ""),
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) recursive %}{% for j in range(99999) recursive %}{% endfor %}{% endfor %}",
    "{% for i in range(3) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "{% for i in range(99999) %}{{ range(99999) | list | length }}{% endfor %}",
    "{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}",
    "{% macro m() %}"
    + "x" * 100_000
    + "{% endmacro %}{% for i in range(99999) %}{{ m() }}{% endfor %}",
    "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(100) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% set ns = namespace(x=[]) %}{% set big = 'a' * 9999999 %}{% for i in range(99999) %}{% set ns.x = ns.x + [big[1:]] %}{% endfor %}",
    "{% set big = 'a' * 9999999 %}{{ ([big] * 999999) | map('upper') | list | length }}",
    "{{ ('a' * 9999).join(range(99999) | map('string')) }}",
    "{{ range(99999) | join('a' * 9999) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%.1000000000f' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{{ '{0}' * 9999 ~ '' }}{{ ('{0}' * 9999).format('a' * 99999) }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a'.zfill(1000000000) }}",
    "{{ 'a'.center(1000000000) }}",
    "{{ '\\t'.expandtabs(1000000000) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a\\na' | indent(1000000000) }}",
    "{{ [1] | tojson(indent=1000000000) }}",
    "{{ [1, 2] | tojson(separators=('a' * 9999999, ':')) }}",
    "{{ 1.5 | round(1000000000, 'ceil') }}",
    "{{ lipsum(1000000000) }}",
    "{{ strftime_now('%Y' * 1000000) }}",
    "{{ strftime_now('%1000000000Y') }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ 'a a' | wordwrap(1, wrapstring='b' * 99999999) }}",
    "{{ raise_exception('a' * 10**9) }}",
    "x" * (chat_sandbox.MAX_SOURCE_CHARS + 1),
    "{{ x" + " ~ x" * 60_000 + " }}",
    "{{ " + "(" * 5000 + "x" + ")" * 5000 + " }}",
    "{% for a in x %}" * 25 + "{% endfor %}" * 25,
]


def test_a_bomb_is_an_error_soon(monkeypatch: pytest.MonkeyPatch, count: Count) -> None:
    monkeypatch.setattr(chat_budget, "MAX_RENDER_S", 0.3)
    took = []
    for source in BOMBS:
        began = time.process_time()
        try:
            (found,) = chat(source).render([[{"role": "user", "content": "a"}]])
        except ModelError:
            pass
        else:
            assert isinstance(found, RowError), (source[:200], str(found)[:200])
            assert found.kind == "chat_template"
            assert len(found.message) < 1000
        took.append(time.process_time() - began)
        assert took[-1] < 3, source[:200]  # below 1 s where nobody else computes
    count(f"bombs={len(BOMBS)} refused={len(took)} slowest={max(took):.2f} s")


ESCAPES = [
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ ('' | attr('\\x5f\\x5fclass\\x5f\\x5f')).mro() }}",
    "{{ messages.__class__ }}",
    "{{ messages[0].__init__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
    "{{ strftime_now.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "{{ dict.__class__ }}",
    "{{ dict.mro() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ range.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ loop.__class__ }}{% for m in messages %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ ['{0.__class__}'] | map('format', 1) | list }}",
    "{{ ('{0.__class__}'.format | list)(1) }}",
    "{{ [''.format] | map('attr', '__self__') | list }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update(a=1) }}",
    "{{ messages | map(attribute='__class__') | list }}{{ ''.__class__.x }}",
    "{{ messages | sort(attribute='__class__.__name__') | first | map('x') }}",
    "{{ (1).__class__.__base__ }}",
    "{{ ().__class__.__bases__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{{ tools.x() }}",
    "{{ bos_token.encode() }}",
    "{{ 'a'.translate({97: 'b' * 9}) }}",
]


def test_python_is_out_of_reach(count: Count) -> None:
    harmless = {"", "[]", "<Namespace>"}
    for source in ESCAPES:
        try:
            program = ChatSandbox().compiled(source)
            found = program.render({"messages": MESSAGES, "bos_token": "<s>"}, chars=100)
        except (*TEMPLATE_ERRORS, RowError):
            continue
        assert found in harmless, (source, found[:100])
    count(f"payloads={len(ESCAPES)} escaped=0")


def test_data_is_never_a_template() -> None:
    for text in ("{{ 7*7 }}", "{% raw %}", "{# #}", "%s {0} %(x)s", "\x00\x1b[0m"):
        assert render("{{ messages[0].content }}", [{"content": text}]) == text


def test_a_long_conversation_has_a_budget_to_match() -> None:
    text = "a b\n" * 2_500_000
    (made,) = chat(HONEST["qwen"]).render([[{"role": "user", "content": text}]])
    assert isinstance(made, str)
    assert len(made) > len(text)


def test_a_template_that_can_t_be_compiled_is_the_model_s_error() -> None:
    with pytest.raises(
        ModelError, match=r"the model's chat template, line 2: unexpected"
    ) as caught:
        chat("a\n{{ x")
    assert "prompt.format" in caught.value.hint


def test_values_are_plain_ones() -> None:
    source = "{{ messages[0].data }} {{ messages[0].n.x | tojson }}"
    message: dict[str, Any] = {
        "role": "user",
        "content": "a",
        "data": b"x",
        "n": {"x": [1, {"y": None}]},
    }
    assert chat(source).render([[message]]) == ['<bytes> [1, {"y": null}]']
    assert json.dumps(message["n"]) == '{"x": [1, {"y": null}]}'


def test_what_a_template_raises_is_the_row_s_error() -> None:
    (found,) = chat("{{ raise_exception('no ' ~ messages[0].role) }}").render([MESSAGES])
    assert isinstance(found, RowError)
    assert found.message == "the model's chat template: no system"
    with pytest.raises(TemplateError):
        render("{{ raise_exception('x') }}")
