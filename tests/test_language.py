"""Language rules of CONTRIBUTING.md: replaced terms, American spelling, the form of docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
from tests.factories import ROOT

# What was replaced, as a pattern, and the term in its place.
REPLACED = {
    r"\bgo(es|ing)? on (from|with|where)\b|\bwent on\b": "resume",
    r"\bAnswerer\b": "GenerationPipeline",
    r"\broomy\b": "preallocated",
    r"\b[Ll]anes?\b": "packer",
    r"\bdeficits?\b": "weighted round-robin",
    r"\bweigh\b": "weight_by",
    r"\btake_step\b": "train_step",
    r"\bStepFigures\b|\bfigures=": "metrics",
    r"\bis_first\b": "is_main_process",
    r"\blog_every\b|\bcheckpoint\.every\b|\bvalidation\.every\b": "log_interval, save_interval, interval",
    r"\bAnswerText\b": "incremental detokenizer",
    r"\bset aside\b": "filtered",
    r"\b[Jj]udge(d|s|ment|ments)\b(?<!LLM judges)": "scored, scorer",
    r"\bthe release('s)? (checkpoint|code|layout|format|model)|\bSOLO's release\b": "the original SOLO code",
    r"\bthe release's\b|\b[io]f the release\b": "the original checkpoint",
    r"\bimage_tokens\b(?<!num_image_tokens)": "num_patches, or num_image_tokens for the whole layout",
    r"\bin the house\b": "in-flight",
    r"\b[Ww]hat came of\b": "result of",
    r"\bpromise of nobody\b": "an estimate",
    r"\blmms-eval's clothes\b": "adapter",
    r"\bsomebody else\b": "say who or what it is",
    r"\bone a (patch|row|step|process|rank|line|sample|token|stream)\b": "one per ...",
    r"\b[Tt]ells? (whether|which|what|how|where)\b": "returns, states",
    r"\b(asked|asks) for (again|more|from)\b": "requested",
    r"\b(is|are) dealt (to|among)\b": "divided among",
    r"\bFIGURES\b|\b_figures\b": "counts, metrics",
    r"\bcounts? from the folder\b": "refers to the folder",
    r"\b(says|said) so when it is (read|asked)": "accessing it raises",
    r"\b(hub|token) ids?\b": "hub ID, token ID",
    r"\b[Ss]trangers?\b": "untrusted, third party",
    r"\bnone of (its|their) business\b|\blies? about\b": "private, false",
    r"\bsave it anew\b": "save it again",
    r"\brefuses\b|(?<!onnections )\b(is|are) refused\b": "rejects, is rejected, is an error",
    r"\b([Tt]he|[Tt]hese|[Tt]hat|[Cc]hanged) data (are|have|were|end)\b": "the data is",
}
# British spellings. The questions and texts of the toy data are data, and keep theirs.
BRITISH = re.compile(
    r"(?<!What )(?<!The )colour|\bgrey|(behavi|neighb|fav|hon|harb)our|\bcentre\b|\bmodell"
    r"|(?<!aria-)labell(ed|ing)"
    r"|(normal|initial|optim|recogn|util|organ|summar|token|quant|serial|minim|maxim)is(e|ed|ing|ation)\b",
    re.IGNORECASE,
)
READ = ("src", "docs", "recipes", "benchmarks", "examples")
PYTHON = ("src", "docs", "benchmarks", "examples", "tests")
SUFFIXES = {".py", ".md", ".yaml", ".jinja", ".html", ".js", ".c"}


@cache
def texts() -> list[Path]:
    files = [path for folder in READ for path in (ROOT / folder).rglob("*")]
    files += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile")]
    return sorted(
        path
        for path in files
        if path.is_file()
        and (path.suffix in SUFFIXES or path.name == "Makefile")
        and "site" not in path.parts
    )


def search(pattern: str | re.Pattern[str], files: Iterable[Path]) -> list[str]:
    """Return the lines that match a pattern, with their places."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        if re.search(pattern, read(path))
        for number, line in enumerate(read(path).splitlines(), 1)
        if re.search(pattern, line)
    ]


@cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("pattern", REPLACED)
def test_replaced_term_is_gone(pattern):
    found = search(pattern, texts())
    assert not found, f"say: {REPLACED[pattern]}\n" + "\n".join(found[:20])


def test_patterns_match_the_replaced_terms():
    """A pattern that could match nothing would prove nothing."""
    samples = [
        *("goes on from the checkpoint", "Answerer", "a roomy cache", "two lanes", "deficit", "weigh"),
        *("take_step(", "StepFigures", "is_first", "log_every: 1", "AnswerText", "set aside", "it judges"),
        *("the release's layout", "as in the release's", "image_tokens", "requests in the house"),
        *(
            "What came of a step",
            "a promise of nobody",
            "lmms-eval's clothes",
            "somebody else",
            "one a patch",
        ),
        *("tells whether", "asked for again", "is dealt to the streams", "FIGURES", "count from the folder"),
        *(
            "says so when it is asked for",
            "a hub id",
            "the data are",
            "a stranger",
            "files that lie about it",
        ),
        *("save it anew", "the template refuses"),
    ]
    assert all(any(re.search(pattern, sample) for sample in samples) for pattern in REPLACED)


def test_spelling_is_american():
    found = search(BRITISH, sorted({*texts(), *(ROOT / "tests").rglob("*.py")} - {Path(__file__)}))
    assert not found, "\n".join(found[:20])


# Verbs in the third person that are never nouns, and some that are, unless a preposition follows.
THIRD_PERSON = re.compile(
    r"(Adds|Builds|Closes|Compares|Computes|Converts|Creates|Decodes|Describes|Downloads|Draws|Encodes|Fetches"
    r"|Fills|Finds|Generates|Gets|Gives|Holds|Keeps|Loads|Makes|Merges|Moves|Opens|Parses|Passes|Prints|Raises"
    r"|Reads|Registers|Removes|Renders|Returns|Saves|Selects|Sends|Shows|Splits|Stands|Starts|Stops|Stores"
    r"|Takes|Tells|Trains|Uses|Verifies|Waits|Wraps|Writes|Yields)\b"
    r"|(Answers|Calls|Changes|Checks|Counts|Measures|Packs|Runs|Samples|Scores|Sets)"
    r"(?![.,:;]| (about|and|at|for|from|in|of|on|per|that|to|with)\b)"
)
QUESTION = re.compile(r"(How|Of|What|Where|Whether|Which|Who|Why)\b")
FRAGMENT = re.compile(r"(A|All|An|As|Each|Every|For|From|In|Its|Like|The|Their|To|With|Without)\b")
SECTION = re.compile(r"( *)(Args|Attributes|Raises)\b[^:]*:$")
ENTRY = re.compile(r" *[\w*., ()/`]+?: (.*)")
LOWER_CASE_NAME = re.compile(r"u?int\d|float\d|bitsandbytes|lmms-eval|pyarrow|transformers|vLLM")
HANGING = re.compile(r"(At|By|From|How|In|Of|On|To|What|Where|Which|With)\b")


def docstring_faults(tree: ast.Module, allow_articles: bool = False) -> Iterator[tuple[int, str]]:
    """Yield (line number, faulty line) of docstrings that are neither imperative nor plain noun phrases.

    `allow_articles` also accepts functions that begin with an article or "all", as fixtures often do.
    """
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not (text := ast.get_docstring(node)):
            continue
        line, first = node.body[0].lineno, text.splitlines()[0]
        name, decorators = getattr(node, "name", ""), getattr(node, "decorator_list", [])
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and name != "__len__"
        is_function &= not any("property" in ast.unparse(decorator) for decorator in decorators)
        is_value = not is_function and isinstance(node, ast.FunctionDef)  # such as "Whether it is finished."
        is_fragment = is_function and not allow_articles and FRAGMENT.match(first)
        is_question = QUESTION.match(first) and not (is_value and first.startswith("Whether "))
        # The docstring of a test may describe it in a sentence.
        if not name.startswith("test_") and (THIRD_PERSON.match(first) or is_fragment or is_question):
            yield line, first
        yield from ((line, entry) for entry in _faulty_entries(text))


def _faulty_entries(text: str) -> Iterator[str]:
    """Yield the descriptions of arguments that are not capitalized, or begin with a hanging preposition."""
    indent: int | None = None  # of the section
    for line in text.splitlines():
        own_indent = len(line) - len(line.lstrip())
        if section := SECTION.fullmatch(line):
            indent = len(section[1])
        elif not line.strip() or (indent is not None and own_indent <= indent):
            indent = None
        elif indent is not None and own_indent == indent + 4 and (entry := ENTRY.match(line)):
            is_name = LOWER_CASE_NAME.match(entry[1])
            if (entry[1][0].islower() and not is_name) or HANGING.match(entry[1]):
                yield line.strip()


def test_docstrings_are_imperative_or_noun_phrases():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {text}"
        for folder in PYTHON
        for path in sorted((ROOT / folder).rglob("*.py"))
        for number, text in docstring_faults(ast.parse(read(path)), allow_articles=folder == "tests")
    ]
    assert not found, "\n".join(found[:20])


@pytest.mark.parametrize(
    ("docstring", "is_faulty"),
    [
        ("Writes a file.", True),
        ("Counts the rows.", True),
        ("Counts of rows.", False),
        ("What a source holds.", True),
        ("Whether it is finished.", True),
        ("Return whether it is finished.", False),
        ("The rows of a file.", True),
        ("Read a file.\n\n    Args:\n        path: of the file.", True),
        ("Read a file.\n\n    Args:\n        path: Of the file.", True),
        ("Read a file.\n\n    Args:\n        path: File to read.", False),
    ],
)
def test_docstring_faults_are_detected(docstring, is_faulty):
    source = f'def read(path):\n    """{docstring}\n    """\n'
    assert bool(list(docstring_faults(ast.parse(source)))) is is_faulty
