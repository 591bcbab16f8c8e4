"""Write the table of LLM families, docs/models.md: `make docs-models`.

Every cell comes from a tiny random model of the family, which has layers of all of its kinds.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from solo_vlm.check.certificate import certify
from solo_vlm.check.probe import Probe
from solo_vlm.check.properties import Finding
from solo_vlm.check.tiny import text_families, tiny_llm, why_not_text
from solo_vlm.data.encode import Encoder
from solo_vlm.generate.cache import supports_prefix_cache
from solo_vlm.generate.pipeline import GenerationPipeline
from solo_vlm.models.from_llm import compose
from solo_vlm.quickstart.llm import train_tokenizer
from solo_vlm.train.model import add_adapters
from solo_vlm.train.parallel.tensor_parallel import tensor_parallel_obstacle
from solo_vlm.train.recipe import LoraSettings
from solo_vlm.utils.errors import SoloError, first_line

PAGE = Path(__file__).with_name("models.md")
COLUMNS = ("init", "text logits", "packed training", "generation", "prefix cache", "tensor parallel", "LoRA")
YES = "yes"
_START, _END = "<!-- written by docs/make_models.py -->", "<!-- end -->"
_NOTHING = "-"
_MAX_REASON = 60


def family_row(family: str) -> list[str]:
    """Try everything with a tiny model of a family; return "yes" or a short reason for each column."""
    tokenizer = train_tokenizer(["a red circle left of a blue square [INST] [/INST]"], vocab_size=320)
    llm = tiny_llm(family, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    ids = torch.arange(5, 45)[None]
    expected = _logits(llm, ids)
    try:
        solo = compose(llm, tokenizer)
    except SoloError as error:
        return [_no(str(error).removeprefix(f"{family} ")), *([_NOTHING] * (len(COLUMNS) - 1))]
    model = solo.model
    text_logits = (_logits(model, ids)[..., : expected.shape[-1]] - expected).abs().max().item()
    others = ("text_logits", "causality", "packing_by_transformers", "supervision", "gradients")
    findings = certify(Probe(model, Encoder(solo.processor)), family, leave_out=others).findings
    generation = _generation(GenerationPipeline(model, solo.processor), findings)
    has_prefixes = supports_prefix_cache(model.config.text_config)
    return [
        _verdict(findings["patches"], findings["saving"]),
        YES if text_logits == 0 else "up to rounding",
        _verdict(findings["packing"], findings["labels"]),
        generation,
        YES if has_prefixes and generation.startswith(YES) else "off",
        _tensor_parallel(model),
        _lora(model),
    ]


def _verdict(*findings: Finding) -> str:
    for finding in findings:
        if finding.status == "fails":
            return _no(finding.detail)
    return YES


def _no(detail: str) -> str:
    """Shorten the detail of a finding or an error, without its figures."""
    if "changes the outputs" in detail:
        reason = "documents are not kept apart"
    elif re.search(r"document \d+ of", detail):
        reason = "not equal to each document alone"
    elif match := re.match(r"prompt|new token", detail):
        reason = "batch differs from single" if match[0] == "prompt" else "cached differs from uncached"
    else:
        reason = re.sub(r"\s+", " ", re.split("[;(]", detail)[0]).removeprefix("SoloError: ").strip()
    return f"no: {reason if len(reason) <= _MAX_REASON else reason[:_MAX_REASON].rstrip() + ' ...'}"


def _generation(pipeline: GenerationPipeline, findings: Mapping[str, Finding]) -> str:
    if not pipeline.use_cache:
        return f"{YES}, without a cache"
    if not pipeline.batches:
        return f"{YES}, one chat at a time"
    return _verdict(findings["batching"], findings["caching"])


def _tensor_parallel(model: PreTrainedModel) -> str:
    obstacle = tensor_parallel_obstacle(model.config)
    return _no(obstacle) if obstacle else YES


def _lora(model: PreTrainedModel) -> str:
    """Train adapters for one step, in place; name the layers whose adapters get no gradient."""
    try:
        add_adapters(model, LoraSettings(rank=2), new_tokens=False)
        adapters = {name: p for name, p in model.named_parameters() if "lora_B" in name}
        ids = torch.arange(5, 69)[None]
        model.train()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    except Exception as error:  # of any type, from PEFT or the family
        return _no(first_line(error))
    idle = {
        [part for part in name.split(".lora_B")[0].split(".") if not part.isdigit()][-1]
        for name, p in adapters.items()
        if p.grad is None and ".experts." not in name
    }
    return f"{YES}, but not in {', '.join(sorted(idle))}" if idle else YES


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


def make_page(rows: dict[str, list[str]]) -> str:
    """Return the part of the page that follows from the installed transformers."""
    others = {
        family: why_not_text(family) for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if family not in rows
    }
    counts = [sum(row[column].startswith(YES) for row in rows.values()) for column in range(len(COLUMNS))]
    lines = [
        _START,
        "",
        f"transformers {transformers.__version__} has {len(rows)} families of text decoders. Those with yes:",
        ", ".join(f"{name} {count}" for name, count in zip(COLUMNS, counts, strict=True)) + ".",
        "",
        *_table(("family", *COLUMNS), ((f"`{family}`", *row) for family, row in rows.items())),
        "",
        f"Its other {len(others)} families of `AutoModelForCausalLM` are no decoders for text:",
        "",
        *_table(("family", "reason"), ((f"`{family}`", str(reason)) for family, reason in others.items())),
        "",
        _END,
    ]
    return "\n".join(lines)


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    header = list(header)
    return [_line(header), _line(["---"] * len(header)), *(_line(row) for row in rows)]


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def read_rows(page: str) -> dict[str, list[str]]:
    """Return the rows of the table of decoders, by family."""
    cells = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    return {name.strip("`"): rest for name, *rest in cells if len(rest) == len(COLUMNS)}


def main() -> None:
    """Write the page; with families as arguments, only their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="families to try again; default: all")
    chosen = parser.parse_args().families or text_families()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.disable_progress_bar()
    page = PAGE.read_text(encoding="utf-8")
    rows = read_rows(page)
    for number, family in enumerate(chosen, 1):
        print(f"{number} of {len(chosen)}: {family}", file=sys.stderr)
        rows[family] = family_row(family)
    rows = {family: rows[family] for family in text_families()}
    before, rest = page.split(_START)
    PAGE.write_text(before + make_page(rows) + rest.split(_END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
