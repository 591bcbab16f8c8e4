"""Any chat template renders or is rejected, in bounded memory."""

from __future__ import annotations

import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solo_vlm.models.solo.bounded_template import render

pytestmark = pytest.mark.fuzz

CHAT = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A dog."}]
ATOMS = [
    "ns.x",
    "ns.y",
    "messages",
    "messages[0].content",
    "'x'",
    "'%s' ",
    "'{0:9}'",
    "9",
    "99999",
    "10 ** 12",
    "[]",
]
ATOMS += ["ns", "loop", "eos", "range(99999)", "caller", "f", "none", "messages|map(attribute='content')"]
OPERATORS = ["+", "*", "**", "%", "~", "-", "//", "==", "<", "in", "and"]
FILTERS = [
    "join",
    "list",
    "string",
    "length",
    "tojson",
    "center",
    "indent",
    "replace",
    "format",
    "upper",
    "trim",
]
FILTERS += [
    "sort",
    "unique",
    "reverse",
    "first",
    "last",
    "items",
    "safe",
    "title",
    "int",
    "default",
    "max",
    "groupby",
]
FILTERS += [
    "random",
    "urlencode",
    "striptags",
    "truncate",
    "wordcount",
    "dictsort",
    "selectattr",
    "batch",
    "sum",
]
METHODS = [
    "join",
    "replace",
    "format",
    "ljust",
    "zfill",
    "expandtabs",
    "split",
    "upper",
    "strip",
    "items",
    "keys",
]
METHODS += [
    "translate",
    "encode",
    "count",
    "startswith",
    "copy",
    "append",
    "format_map",
    "splitlines",
    "__class__",
]


def combine(inner):
    arguments = st.lists(inner, max_size=2).map(", ".join)
    return st.one_of(
        st.tuples(inner, st.sampled_from(OPERATORS), inner).map(lambda x: f"({x[0]} {x[1]} {x[2]})"),
        st.tuples(inner, st.sampled_from(FILTERS), arguments).map(lambda x: f"({x[0]}|{x[1]}({x[2]}))"),
        st.tuples(inner, st.sampled_from(METHODS), arguments).map(lambda x: f"({x[0]}).{x[1]}({x[2]})"),
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(inner, max_size=2).map(
            lambda items: f"{{{', '.join(f'{i!r}: {x}' for i, x in enumerate(items))}}}"
        ),
        st.tuples(inner, inner).map(lambda x: f"namespace(x={x[0]}, y={x[1]})"),
        inner.map(lambda x: f"({x})[1:]"),
        arguments.map(lambda x: f"f({x})"),
    )


EXPRESSIONS = st.recursive(st.sampled_from(ATOMS), combine, max_leaves=6)


def nest(inner):
    body = st.lists(inner, max_size=3).map("".join)
    return st.one_of(
        st.tuples(EXPRESSIONS, body).map(lambda x: f"{{% for a in {x[0]} %}}{x[1]}{{% endfor %}}"),
        body.map(lambda x: f"{{% for a in range(999) %}}{x}{{% endfor %}}"),
        st.tuples(EXPRESSIONS, body).map(lambda x: f"{{% if {x[0]} %}}{x[1]}{{% endif %}}"),
        body.map(lambda x: f"{{% macro f(a, b) %}}{x}{{% endmacro %}}"),
        body.map(lambda x: f"{{% call f() %}}{x}{{% endcall %}}"),
        body.map(lambda x: f"{{% set ns.x %}}{x}{{% endset %}}"),
        body.map(lambda x: f"{{% filter upper %}}{x}{{% endfilter %}}"),
        body.map(lambda x: f"{{% generation %}}{x}{{% endgeneration %}}"),
    )


STATEMENTS = st.one_of(
    EXPRESSIONS.map(lambda x: f"{{{{ {x} }}}}"),
    EXPRESSIONS.map(lambda x: f"{{% set ns.x = {x} %}}"),
    EXPRESSIONS.map(lambda x: f"{{% set ns.y = {x} %}}"),
    st.just("x" * 99),
)
TEMPLATES = st.lists(st.recursive(STATEMENTS, nest, max_leaves=8), max_size=4).map("".join)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@given(TEMPLATES)
def test_template(source):
    before = peak_bytes()
    try:
        rendered = render("{% set ns = namespace(x='x', y=2) %}" + source, CHAT, True, {"eos": "</s>"})
    except Exception as error:  # a template may raise errors of any type
        assert not isinstance(error, MemoryError)
    else:
        assert len(rendered) < 3e7
    assert peak_bytes() - before < 1e9


@given(st.text(max_size=99))
def test_text(source):
    try:
        render(source, CHAT, True, {})
    except Exception as error:
        assert not isinstance(error, MemoryError)
