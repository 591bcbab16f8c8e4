"""One word for one thing: terms that the glossary of CONTRIBUTING.md replaced do not come back."""

from __future__ import annotations

import re
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
}
READ = ("src", "docs", "recipes", "benchmarks", "examples")
SUFFIXES = {".py", ".md", ".yaml", ".jinja", ".html", ".js", ".c"}


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


@pytest.mark.parametrize("pattern", REPLACED)
def test_replaced_term_is_gone(pattern):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, f"say: {REPLACED[pattern]}\n" + "\n".join(found[:20])


def test_patterns_find_what_they_replace():
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
    ]
    assert all(any(re.search(pattern, sample) for sample in samples) for pattern in REPLACED)
