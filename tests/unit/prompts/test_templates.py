import datetime
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantbatch.errors import RowError, SpecError
from quantbatch.prompts import sandbox, templates
from quantbatch.prompts.templates import RowTemplate, check_columns

WHERE = "prompt.template"

# Ways out of Jinja that are known (the usual lists of payloads; str.format and its kin are those of
# CVE-2016-10745, CVE-2019-10906, CVE-2024-56326 and CVE-2025-27516), and some of our own.
SSTI = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''|attr('__class__') }}",
    "{{ x|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ lipsum(1000) }}",
    "{{ dict.__base__ }}",
    "{{ dict(a=1) }}",
    "{{ range(10) }}",
    "{{ config.items() }}",
    "{{ request['application']['__globals__']['__builtins__']['__import__']('os') }}",
    "{{ get_flashed_messages.__globals__.__builtins__.open('/etc/passwd').read() }}",
    "{{ url_for.__globals__ }}",
    "{{ x.format(x) }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(x) }}",
    "{{ '{0.__class__}'|format(x) }}",
    "{{ '%s' % x }}",
    "{{ '%(a)s'|format(a=1) }}",
    "{{ ('%c' % 95) ~ 'x' }}",
    "{{ x.__format__('') }}",
    "{{ x.format_map({'a': x}) }}",
    "{{ ['{0.__class__}']|map('format', x)|list }}",
    "{{ x|map(attribute='__class__')|list }}",
    "{{ tags|sort(attribute='__class__') }}{{ tags|map('upper') }}",
    "{{ tags|groupby('__class__') }}",
    "{{ tags|selectattr('__class__')|list }}",
    "{{ x|xmlattr }}",
    "{{ x|pprint }}",
    "{{ x|safe }}",
    "{{ x|urlize }}",
    "{{ tags.append(1) }}",
    "{{ tags.__len__() }}",
    "{{ x.upper() }}",
    "{{ (x.upper)() }}",
    "{{ loop.__init__.__globals__ }}",
    "{% for t in tags %}{{ loop.cycle('a') }}{% endfor %}",
    "{% for t in tags recursive %}{{ loop(tags) }}{% endfor %}",
    "{% include 'passwd' %}",
    "{% import 'os' as os %}",
    "{% from 'os' import popen %}",
    "{% extends 'base' %}",
    "{% block b %}{% endblock %}",
    "{% macro m() %}{{ caller() }}{% endmacro %}",
    "{% call m() %}{% endcall %}",
    "{% set a = x %}",
    "{% set a %}b{% endset %}",
    "{% with a = x %}{{ a }}{% endwith %}",
    "{% filter upper %}a{% endfilter %}",
    "{% autoescape true %}{% endautoescape %}",
    "{% do x.append(1) %}",
    "{% debug %}",
    "{% print(x) %}{{ x() }}",
    "{% trans %}a{% endtrans %}",
    "{{ x is filter }}",
    "{{ x|upper(*tags) }}",
    "{{ x|replace(**meta) }}",
    "{{ columns }}",
    "{{ columns[x] }}",
    "{{ columns|tojson }}",
    "{% for columns in tags %}{% endfor %}",
]
ROW = {"x": "value", "tags": ["a", "b"], "meta": {"k": "v"}}


def render(source: str, **row: object) -> str:
    return RowTemplate.compile(source, WHERE).render(row)


@pytest.mark.parametrize("source", SSTI)
def test_a_payload_is_refused(source: str) -> None:
    # A name that no column has, such as `config`, is refused when the columns are checked.
    with pytest.raises(SpecError, match=r"prompt\.template"):
        check_columns([RowTemplate.compile(source, WHERE)], ROW)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__']['__mro__'][1] }}",
        "{{ 1.5|round(1000000000, 'ceil') }}",
        "{{ x.upper }}",
        "{{ x.__class__ }}",
        "{{ x['__class__'] }}",
        "{{ x[0].__class__ }}",
        "{{ tags.append }}",
        "{{ meta.items }}",
        "{{ meta.__class__.__base__ }}",
        "{{ tags|sort(attribute='__class__')|join }}",
        "{% for t in tags %}{{ loop.__class__ }}{% endfor %}",
        "{% for t in tags %}{{ loop._iterator }}{% endfor %}",
        "{% for t in tags %}{{ loop }}{% endfor %}",
        "{% for t in tags %}{{ loop.cycle }}{% endfor %}",
        "{{ meta }}",
        "{{ tags }}",
        "{{ tags ~ '' }}",
        "{{ tags|string }}",
        "{{ tags + tags }}",
    ],
)
def test_python_is_out_of_reach(source: str) -> None:
    with pytest.raises(RowError) as caught:
        render(source, **ROW)
    assert caught.value.kind == "template"


def test_columns_are_a_row_and_not_an_object() -> None:
    assert RowTemplate.compile("{{ columns.__class__ }}", WHERE).columns == {"__class__"}


BOMBS = [
    "{{ 'a' * 10**9 }}",
    "{{ 9**9**9 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ 'a'|center(1000000000) }}",
    "{{ 'a'|indent(1000000000) }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ [x, x, x]|tojson }}",
    "{{ [[1]]|tojson }}",
    "{{ x" + " ~ x" * 3000 + " }}",
    "{{ " + "(" * 5000 + "x" + ")" * 5000 + " }}",
    "{{ " + "-" * 5000 + "1 }}",
    "{{ x" + "|trim" * 3000 + " }}",
    "{{ x" + ".y" * 3000 + " }}",
    "{% for t in tags %}" * 25 + "{% endfor %}" * 25,
    "{% if x %}" * 500 + "{% endif %}" * 500,
    "x" * (templates.MAX_SOURCE_CHARS + 1),
]


@pytest.mark.parametrize("source", BOMBS, ids=range(len(BOMBS)))
def test_a_bomb_is_refused(source: str) -> None:
    started = time.process_time()
    with pytest.raises(SpecError):
        RowTemplate.compile(source, WHERE)
    assert time.process_time() - started < 1


GROWING = [
    "{% for a in many %}{% for b in many %}{{ text }}{% endfor %}{% endfor %}",
    "{% for a in many %}{{ text ~ text ~ text }}{% endfor %}",
    "{{ " + " ~ ".join(["text"] * 100) + " }}",
    "{{ " + " + ".join(["text"] * 60) + " }}",
    "{{ text" + "|replace('a', 'aaaaaaaaaa')" * 10 + " }}",
    "{{ 'a'" + "|replace('a', 'aaaaaaaaaa')" * 30 + " }}",
    "{{ many|join(text) }}",
    "{{ text|list|join(text) }}",
    "{{ 'a'|replace('a', text)|replace('a', text) }}",
    "{{ text|replace('', text) }}",
    "{{ quotes" + "|tojson" * 30 + " }}",
    "{{ shared|tojson }}",
]


@pytest.mark.parametrize("source", GROWING)
def test_growth_is_bounded(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_RENDER_S", 0.5)
    text = "a" * 1_000_000
    row = {"text": text, "many": list(range(5000)), "quotes": '"' * 1000, "shared": [text] * 100}
    template = RowTemplate.compile(source, WHERE)
    started = time.process_time()
    with pytest.raises(RowError) as caught:
        template.render(row)
    assert caught.value.kind in ("prompt_too_long", "template")
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in many %}{% for b in many %}{% endfor %}{% endfor %}",
        "{% for a in many if a in many %}{% for b in many if false %}{% endfor %}{% endfor %}",
        "{% for a in many %}{% for b in many %}{% for c in many %}x" + "{% endfor %}" * 3,
        "{% for a in many %}{% for b in many %}{{ loop.last }}{% endfor %}{% endfor %}",
    ],
)
def test_loops_are_bounded(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_STEPS", 50_000)
    template = RowTemplate.compile(source, WHERE)
    with pytest.raises(RowError, match="the loops run more than 50,000 times"):
        template.render({"many": list(range(500))})


def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_RENDER_S", 0.05)
    template = RowTemplate.compile(
        "{% for a in many %}{% if a ~ text == '' %}{% endif %}{% endfor %}", WHERE
    )
    with pytest.raises(RowError, match=r"took longer than 0\.05 s"):
        template.render({"many": list(range(100_000)), "text": "a" * 1_000_000})


def test_ten_megabytes_pass() -> None:
    text = "a b\n" * 2_500_000
    assert render("<{{ text }}>", text=text) == f"<{text}>"


@given(st.text(), st.text())
def test_a_rows_text_is_never_a_template(one: str, other: str) -> None:
    assert render("<{{ one }}|{{ other }}>", one=one, other=other) == f"<{one}|{other}>"


@pytest.mark.parametrize(
    "text",
    [
        "{{ 7*7 }}",
        "{% raw %}",
        "{# #}",
        "{{ x",
        "%}",
        "<b>&amp;</b>",
        "\x00\x1b[0m\r\n",
        "שלום 👋🏽",
    ],
)
def test_text_stays_as_it_is(text: str) -> None:
    assert render("{{ x }}", x=text) == text
    assert render("{% for t in tags %}{{ t }}{% endfor %}", tags=[text]) == text


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("{{ x | trim | upper }}", "VALUE"),
        ("{{ tags | join(', ') }}", "a, b"),
        ("{{ tags | length + 1 }}", "3"),
        ("{{ x | truncate(4, true, '.') }}|{{ 'one two three' | truncate(9) }}", "val.|one..."),
        ("{{ x | replace('v', 'V') }}", "Value"),
        ("{{ 2.345 | round(1) }} {{ '7' | int // 2 }} {{ 1 / 4 }}", "2.3 3 0.25"),
        ("{{ meta | tojson }} {{ x[1:3] }} {{ tags[-1] }} {{ x[0] }}", '{"k": "v"} al b v'),
        ("{{ meta.k }}{{ meta['k'] }}", "vv"),
        ("{% for t in tags %}\n- {{ loop.index }} {{ t }}\n{% endfor %}\nend", "- 1 a\n- 2 b\nend"),
        ("{% for k, v in meta | items %}{{ k }}={{ v }}{% endfor %}", "k=v"),
        ("{% for t in tags if t != 'a' %}{{ t }}{% else %}none{% endfor %}", "b"),
        ("{{ 'yes' if x in ('value', 'other') else 'no' }}", "yes"),
        ("{% if x is string and not x is number %}s{% elif x %}t{% else %}u{% endif %}", "s"),
        ("{{ x ~ 1 ~ '-' ~ x | length }}", "value1-5"),
        ("{{ columns['Review Text'] }} {{ columns['class'] }} {{ columns.x }}", "ok c value"),
        ("{% raw %}{{ x }}{% endraw %}{# note #}", "{{ x }}"),
        ("{{ when }} {{ true }}", "2026-01-02 True"),
        ("{{ tags | sort | first }}{{ tags | last }}{{ x | list | length }}", "ab5"),
        ("no column\n", "no column"),
    ],
)
def test_rendering(source: str, wanted: str) -> None:
    more = {"Review Text": "ok", "class": "c", "when": datetime.date(2026, 1, 2)}
    assert render(source, **ROW, **more) == wanted


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("{{ x | default('-') }}", "-"),
        ("{% if x %}a{% else %}b{% endif %}", "b"),
        ("{{ x is none }}{{ x is defined }}", "TrueFalse"),
        ("{% for t in tags | default([]) %}{{ t }}{% endfor %}.", "."),
        ("{{ deep.gone | default('-') }}", "-"),
        ("{{ deep | tojson }}", '{"gone": null, "list": [null]}'),
        ("{% for t in deep.list %}{{ t | default('-') }}{% endfor %}", "-"),
    ],
)
def test_a_null_can_be_handled(source: str, wanted: str) -> None:
    assert render(source, x=None, tags=None, deep={"gone": None, "list": [None]}) == wanted


@pytest.mark.parametrize(
    "source",
    [
        "{{ x }}",
        "{{ 'a' ~ x }}",
        "{{ x | upper }}",
        "{{ x | trim }}",
        "{{ x | length }}",
        "{{ x + 1 }}",
        "{{ x == 1 }}",
        "{{ x.y }}",
        "{{ x | join }}",
        "{% for t in x %}{% endfor %}",
        "{{ tags | join }}",
        "{{ tags[0] }}",
        "{{ x | replace('a', 'b') }}",
        "{{ 'abc' | replace('a', x) }}",
    ],
)
def test_a_null_never_prints(source: str) -> None:
    with pytest.raises(RowError) as caught:
        render(source, x=None, tags=[None])
    assert caught.value.kind == "null_prompt"
    assert "is null; to print something else: {{ " in caught.value.message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("one\n{{ meta.gone }}", "prompt.template, line 2: 'dict object' has no attribute 'gone'"),
        ("{{ 1 // 0 }}", "prompt.template, line 1: integer division or modulo by zero"),
        ("{{ x - 1 }}", "unsupported operand"),
        ("{{ x[7] }}", "line 1: str object has no element 7"),
        ("{{ data }}", "binary data can't be printed"),
        ("{{ meta }}", "a struct can't be printed; use join or tojson"),
        ("{{ none }}", "a null can't be printed"),
        ("{{ data | tojson }}", "binary data can't be printed"),
    ],
)
def test_a_rows_error_says_what_and_where(source: str, message: str) -> None:
    with pytest.raises(RowError) as caught:
        render(source, **ROW, data=b"x")
    assert caught.value.kind == "template"
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("source", "problem", "hint"),
    [
        (
            "a\n{{ x.strip() }}",
            "prompt.template, line 2: a call is not allowed",
            "{{ text | trim }}",
        ),
        ("{{ 'a' * 3 }}", "the operator * is not allowed", "+ - / // ~"),
        ("{% set a = 1 %}", "{% set %} is not allowed", "{% for %}"),
        ("{% include 'a' %}", "{% include %} is not allowed", ""),
        ("{{ x | shout }}", "no filter 'shout'", "trim, truncate, upper"),
        ("{{ x is divisible }}", "no test 'divisible'", "divisibleby"),
        ("{{ [x] }}", "a list may hold only texts and numbers", ""),
        ("\n\n{{ x", "line 3: unexpected end of template", ""),
        ("{{ self.x }}", "the name self is Jinja's own", "columns['self']"),
        ("{{ columns[x] }}", "columns needs a name in quotes", "columns['Review Text']"),
    ],
)
def test_a_specs_error_says_what_where_and_what_else(source: str, problem: str, hint: str) -> None:
    with pytest.raises(SpecError) as caught:
        RowTemplate.compile(source, WHERE)
    (found,) = caught.value.problems
    assert problem in found.problem
    assert hint in found.hint


def test_columns_are_those_that_the_template_reads() -> None:
    source = "{{ a }}{% for b in c if b.x and y %}{{ b }}{{ loop.index }}{{ z }}{% else %}{{ v }}"
    source += (
        "{% endfor %}{% for k, w in w %}{{ k }}{{ w }}{% endfor %}{{ columns['d e'] }}{{ loop }}"
    )
    assert RowTemplate.compile(source, WHERE).columns == {*"acyzvw", "d e", "loop"}


def test_a_missing_column_is_named_with_its_neighbour() -> None:
    template = RowTemplate.compile("{{ docstrng }}{{ zzz }}{{ id }}", WHERE)
    with pytest.raises(SpecError) as caught:
        check_columns([template], ["id", "docstring"])
    near, far = caught.value.problems
    assert near.problem == "prompt.template uses the column 'docstrng', which the input lacks"
    assert near.hint == "did you mean 'docstring'? the columns are id, docstring"
    assert far.hint == "the columns are id, docstring"


@given(st.text(alphabet="ab[]"), st.text(alphabet="ab[]"))
def test_marks_stand_around_each_value(one: str, other: str) -> None:
    source = "a{{ one }}]b[{{ other|upper }}{{ 'c' }}"
    template = RowTemplate.compile(source, WHERE, marks=("[", "]"))
    one_bare, other_bare = (t.replace("[", "").replace("]", "") for t in (one, other.upper()))
    assert template.render({"one": one, "other": other}) == f"a[{one_bare}]b[{other_bare}][c]"


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda child: st.lists(child) | st.dictionaries(st.text(), child),
        max_leaves=10,
    )
)
def test_tojson_is_json(value: object) -> None:
    assert json.loads(render("{{ columns['value'] | tojson }}", value=value)) == value
