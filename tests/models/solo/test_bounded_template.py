"""Limits of chat templates: hostile ones end soon with little memory, and ordinary ones render as before."""

from __future__ import annotations

import resource
import threading

import pytest
from tests.models.solo.chat_templates import FAMILIES
from transformers.utils.chat_template_utils import _compile_jinja_template

from solo_vlm.models.solo.bounded_template import (
    MAX_SOURCE_CHARACTERS,
    TemplateLimitError,
    _BoundedEnvironment,
    render,
)

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What? " * 100},
    {"role": "assistant", "content": "This."},
]
DOUBLE = "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = {} %}{% endfor %}{{ ns.x }}"
HOSTILE = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "output": "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "static output": "{% for a in range(99999) %}" + "x" * 99999 + "{% endfor %}",
    "block": "{% set t %}{% for a in range(99999) %}{{ 'x' * 9999 }}{% endfor %}{% endset %}{{ t }}",
    "repetition": "{{ 'x' * 10000000000 }}",
    "repetition of lists": "{{ ['x'] * 10000000000 }}",
    "repetition of repetitions": "{{ ('x' * 99999 * 99999)|length }}",
    "doubling": DOUBLE.replace("{}", "ns.x + ns.x"),
    "doubling by ~": DOUBLE.replace("{}", "ns.x ~ ns.x"),
    "doubling by join": DOUBLE.replace("{}", "[ns.x, ns.x]|join"),
    "doubling by format": DOUBLE.replace("{}", "'%s%s' % (ns.x, ns.x)"),
    "doubling by str.format": DOUBLE.replace("{}", "'{0}{0}'.format(ns.x)"),
    "doubling by replace": DOUBLE.replace("{}", "ns.x.replace('a', 'aa')"),
    "doubling of lists": DOUBLE.replace("{}", "[ns.x, ns.x]"),
    "doubling of dicts": DOUBLE.replace("{}", "{'a': ns.x, 'b': ns.x}"),
    "doubling of tuples": DOUBLE.replace("{}", "(ns.x, ns.x)"),
    "doubling of namespaces": DOUBLE.replace("{}", "namespace(a=ns.x, b=ns.x)"),
    "comparison of doubled lists": (
        "{% set ns = namespace(x=1, y=1) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}"
        "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}"
    ),
    "namespace in itself": "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}",
    "power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "large numbers": DOUBLE.replace("x='a'", "x=9").replace("{}", "ns.x * ns.x"),
    "wide format": "{{ '%10000000000d' % 1 }}",
    "wide format by argument": "{{ '%*d' % (10000000000, 1) }}",
    "wide str.format": "{{ '{:>10000000000}'.format(1) }}",
    "wide str.format by argument": "{{ '{:>{}}'.format(1, 10000000000) }}",
    "wide format filter": "{{ '%10000000000d'|format(1) }}",
    "ljust": "{{ 'x'.ljust(10000000000) }}",
    "center filter": "{{ 'x'|center(10000000000) }}",
    "indent filter": "{{ ('x\n' * 9999)|indent(99999) }}",
    "expandtabs": "{{ ('\t' * 9999).expandtabs(99999) }}",
    "replace": "{{ ('x' * 99999).replace('x', 'y' * 99999) }}",
    "replace filter": "{{ ('x' * 99999)|replace('x', 'y' * 99999) }}",
    "join": "{{ (['x' * 99999] * 99999)|join }}",
    "join of an iterator": "{{ range(99999)|map('replace', '1', 'y' * 9999)|join }}",
    "join of an attribute": "{{ ([{'a': 'x' * 99999}] * 99999)|join(attribute='a') }}",
    "str.join": "{{ ('x' * 99999).join(['y'] * 99999) }}",
    "list as text": "{{ ['x' * 99999] * 99999 }}",
    "list as text by a filter": "{{ (['x' * 99999] * 99999)|string }}",
    "JSON": "{{ (['x' * 99999] * 99999)|tojson }}",
    "JSON, indented": "{{ ([1] * 9999)|tojson(indent=99999) }}",
    "translate": "{{ ('x' * 99999).translate({120: 'y' * 99999}) }}",
    "slices": (
        "{% set ns = namespace(x=[]) %}{% set s = 'x' * 9999999 %}{% for i in range(9999) %}"
        "{% set ns.x = ns.x + [s[1:]] %}{% endfor %}"
    ),
    "sum of lists": "{{ range(99999)|map('string')|map('list')|sum(start=[]) }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "wide recursion": (
        "{% macro f(n) %}{% if n < 30 %}{{ f(n + 1) }}{{ f(n + 1) }}{% endif %}{% endmacro %}{{ f(0) }}"
    ),
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "loop in a macro in a call": (
        "{% macro f() %}{{ caller() }}{{ caller() }}{% endmacro %}"
        + "{% call f() %}" * 30
        + "x"
        + "{% endcall %}" * 30
    ),
    **{
        f"repeated {name}": (
            "{% set a = range(99999)|list %}{% set b = range(99999)|list %}{% set s = 'x' * 2999999 %}"
            "{% set t = s + 'y' %}{% for i in range(99999) %}" + work + "{% endfor %}"
        )
        for name, work in {
            "comparison": "{{ a == b }}",
            "comparison of texts": "{{ s + 'y' == t }}",
            "search in a list": "{{ 'z' in a }}",
            "search in a text": "{{ 'z' in s }}",
            "search by a method": "{{ s.count('z') }}",
            "maximum": "{{ a|max }}",
            "maximum of a range": "{{ range(99999)|max }}",
            "maximum of an iterator": "{{ a|map('int')|max }}",
            "test": "{{ a is eq b }}",
            "selection": "{{ a|select('eq', 'z')|first }}",
            "loop with a condition": "{% for j in range(99999) if j is none %}{% endfor %}",
        }.items()
    },
    "list of the input": "{{ ([messages] * 99999)|string|length }}",
    "text of the input": "{{ [messages] * 999999 }}",
    "error about the input": "{{ raise_exception([messages] * 999999) }}",
    "long source": " " * (MAX_SOURCE_CHARACTERS + 1),
    "deep source": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "no syntax": "{% for",
    "attribute of the sandbox": "{{ ''.__class__.__mro__ }}{{ ''.__class__.x }}",
}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.timeout(60)  # each takes seconds at most
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_template_ends_soon_with_little_memory(kind):
    before = peak_bytes()
    with pytest.raises(Exception) as caught:
        render(HOSTILE[kind], CHAT, True, {})
    assert not isinstance(caught.value, MemoryError)
    assert peak_bytes() - before < 5e8


@pytest.mark.parametrize("name", FAMILIES)
def test_ordinary_templates_render_as_in_transformers(name):
    tokenizer = FAMILIES[name].tokenizer()
    chats = [CHAT[1:], CHAT[1:2], [*CHAT[1:], *CHAT[1:]]]
    for chat in chats:
        for prompt in (False, True):
            expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert render(tokenizer.chat_template, chat, prompt, tokenizer.special_tokens_map) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages|map(attribute='role')|join(', ') }}", "system, user, assistant"),
        ("{{ messages[1:]|length }}{{ messages[0].content[:2] }}", "2Be"),
        ("{% set (a, b) = (1, 2) %}{{ a ~ '-' ~ b }}", "1-2"),
        ("{% for key, value in {'a': 1}.items() %}{{ key }}{{ value }}{% endfor %}", "a1"),
        ("{{ '%s: %03d' % ('a', 7) }}{{ '{:>4}'.format('b') }}", "a: 007   b"),
        ("{{ dict(messages[0], context='x', function='y').context }}", "x"),
        ("{{ messages[0]|tojson(indent=1) }}", '{\n "role": "system",\n "content": "Be brief."\n}'),
        ("{% generation %}{{ 2 ** 10 + 1 }}{% endgeneration %}", "1025"),
        ("{{ none }}{{ [1, 'a'] }}{{ ('a',) }}", "None[1, 'a']('a',)"),
        ("{% for m in messages if m.role == 'user' %}{{ loop.index }}{% else %}none{% endfor %}", "1"),
    ],
)
def test_expressions_keep_their_meaning(source, expected):
    assert render(source, CHAT, False, {}) == expected


def test_long_chats_are_within_the_limits():
    tokenizer = FAMILIES["qwen3" if "qwen3" in FAMILIES else next(iter(FAMILIES))].tokenizer()
    turn = [{"role": "user", "content": "word " * 2000}, {"role": "assistant", "content": "word " * 2000}]
    chat = turn * 300
    expected = tokenizer.apply_chat_template(chat, tokenize=False)
    assert render(tokenizer.chat_template, chat, False, tokenizer.special_tokens_map) == expected


@pytest.mark.parametrize(
    "turn",
    [
        "{{ render(messages, loop.index0) }}",
        "{{ 'last' if message == messages|selectattr('role', 'equalto', 'user')|list|last }}",
        "{{ messages[loop.index:]|selectattr('role', 'equalto', 'user')|list|length }}",
        "{% set ns.text = ns.text + '<' + message.role + '>' + message.content %}",
        "{% set ns.text = ns.text ~ '<' ~ message.role ~ '>' ~ message.content %}",
        "{% for later in messages[loop.index:] %}{% if later.role == 'user' %}{% endif %}{% endfor %}",
    ],
)
def test_templates_may_look_at_all_messages_in_every_turn(turn):
    source = (
        "{% macro render(messages, index) %}{{ messages[index].content }}{% endmacro %}"
        "{% set ns = namespace(text='') %}{% for message in messages %}" + turn + "{% endfor %}{{ ns.text }}"
    )
    chat = [{"role": role, "content": "word " * 200} for _ in range(100) for role in ("user", "assistant")]
    assert render(source, chat, False, {}) == _compile_jinja_template(source).render(messages=chat)


def test_each_rendering_of_a_thread_has_a_budget():
    source = "{% for i in range(99999) %}x{% endfor %}"
    failed = []

    def work():
        for _ in range(5):
            try:
                render(source, CHAT, False, {})
            except TemplateLimitError as error:
                failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_templates_cannot_access_objects_in_messages(tmp_path):
    class Writer:
        def write(self):
            (tmp_path / "written").write_text("x")

    chat = [{"role": "user", "content": "What?", "tool": Writer(), "nothing": None}]
    assert render("{{ messages[0].tool }}{{ messages[0].keys()|list }}", chat, False, {}) == (
        "<Writer>['role', 'content', 'tool']"
    )


def test_appending_to_a_list_takes_steps_for_what_is_new(monkeypatch):
    source = "{% set ns = namespace(x=[]) %}{% for i in range(N) %}{% set ns.x = ns.x + [i] %}{% endfor %}"
    charge, steps = _BoundedEnvironment.charge, []
    monkeypatch.setattr(_BoundedEnvironment, "charge", lambda *args: steps.append(0) or charge(*args))
    counts = []
    for number in (100, 200):
        steps.clear()
        render(source.replace("N", str(number)), CHAT, False, {})
        counts.append(len(steps))
    assert counts[1] < 2.5 * counts[0]
