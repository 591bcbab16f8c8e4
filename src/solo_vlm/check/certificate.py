"""Certificate of a model: the findings of all properties, and the check that precedes training."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from solo_vlm.check import properties
from solo_vlm.check.chats import template
from solo_vlm.check.probe import SHORT, TOLERANCES, Probe
from solo_vlm.check.properties import Finding
from solo_vlm.check.settings import settings
from solo_vlm.check.tiny import tiny_solo
from solo_vlm.data.encode import Encoder
from solo_vlm.utils.errors import SoloError, first_line

PROPERTIES: dict[str, tuple[str, Callable[[Probe], Finding]]] = {
    "text_logits": ("text logits equal the LLM's", properties.text_logits),
    "settings": ("settings fit tokenizer and LLM", settings),
    "template": ("chat template writes every turn", template),
    "causality": ("no future token is visible", properties.causality),
    "packing": ("packed equals alone: training", properties.packing),
    "packing_by_transformers": ("packed equals alone: transformers", properties.packing_by_transformers),
    "labels": ("labels shifted exactly once", properties.labels),
    "supervision": ("labels only on answers and their ends", properties.supervision),
    "batching": ("batch equals single", properties.batching),
    "caching": ("cached equals uncached", properties.caching),
    "patches": ("patches reach their places", properties.patches),
    "gradients": ("gradients reach every parameter", properties.gradients),
    "saving": ("saved and reloaded equals itself", properties.saving),
}
"""Title and function of each property, in order."""

OF_INIT = ("settings", "template", "supervision", "patches")
"""What making a SOLO model can break, apart from text logits; needs no pass through the decoder."""

OF_FAMILY = ("causality", "packing", "batching", "caching", "gradients")
"""What depends on the family of the decoder and the design of images, not on weights."""


@dataclass(frozen=True)
class Certificate:
    """Findings about one model.

    Attributes:
        model: Path or hub ID.
        kind: "SOLO model", "LLM" or "image-text model", with its family and the origin of its weights.
        findings: Finding of each property, by its name.
        seconds: Time of the checks, without loading.
    """

    model: str
    kind: str
    findings: Mapping[str, Finding]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every property that applies holds."""
        return all(finding.status != "fails" for finding in self.findings.values())

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "model": self.model,
            "kind": self.kind,
            "passed": self.passed,
            "seconds": round(self.seconds, 2),
            "properties": {name: asdict(finding) for name, finding in self.findings.items()},
        }


def certify(
    probe: Probe,
    name: str,
    leave_out: Collection[str] = (),
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Certificate:
    """Check all properties of a model; an error inside of the model is a finding.

    Args:
        probe: Model under check.
        name: Path or hub ID, for the certificate.
        leave_out: Names of properties.
        on_progress: Called with the completed and the total number of properties.
    """
    started = time.perf_counter()
    findings = {}
    for number, (key, (_, check)) in enumerate(PROPERTIES.items(), 1):
        findings[key] = Finding("skipped", "left out") if key in leave_out else _run(check, probe)
        on_progress(number, len(PROPERTIES))
    return Certificate(name, _kind(probe), findings, time.perf_counter() - started)


def certify_init(model: PreTrainedModel, processor: Any, name: str) -> Certificate:
    """Check a new SOLO model without a pass through its decoder, and a tiny one of its family and design.

    Args:
        model: New model.
        processor: Its processor.
        name: Path or hub ID of the LLM, for the certificate.
    """
    started = time.perf_counter()
    probe = Probe(model, Encoder(processor), tolerance=TOLERANCES[model.dtype])
    findings = {key: _run(PROPERTIES[key][1], probe) for key in OF_INIT}
    try:
        family = Probe(tiny_solo(model.config))
    except Exception as error:  # of any type: not every family can be made at any size
        findings |= dict.fromkeys(OF_FAMILY, Finding("skipped", first_line(error)))
    else:
        findings |= {key: _run(PROPERTIES[key][1], family) for key in OF_FAMILY}
    return Certificate(name, _kind(probe), findings, time.perf_counter() - started)


def require_exact_packing(
    model: PreTrainedModel, path: str | Path, tolerance: float = TOLERANCES[torch.float32]
) -> None:
    """Check that training on packed documents is exact, on three short documents.

    Args:
        model: Loaded model, in one process.
        path: Folder or hub ID, for the message.
        tolerance: Largest difference of logits, relative to their size.

    Raises:
        SoloError: A packed document does not compute what it computes alone.
    """
    was_training = model.training
    finding = _run(properties.packing, Probe(model.eval(), tolerance=tolerance, shapes=SHORT))
    model.train(was_training)
    if finding.status == "fails":
        raise SoloError(
            f"{path}: packed training would be wrong for {model.config.get_text_config().model_type}: "
            f"{finding.detail} (see solo check {path}); choose another LLM"
        )


def require_exact_slices(model: PreTrainedModel, path: str | Path, count: int) -> None:
    """Check that processes may compute a slice of a packed row each (context parallelism).

    Args:
        model: Loaded model, in one process.
        path: Folder or hub ID, for the message.
        count: Number of slices.

    Raises:
        SoloError: A slice does not compute what the row does, apart from attention.
    """
    was_training = model.training
    finding = _run(partial(properties.slices, count=count), Probe(model.eval(), shapes=SHORT))
    model.train(was_training)
    if finding.status == "fails":
        raise SoloError(
            f"parallel.context = {count} would be wrong for {path}: {finding.detail}; set it to 1"
        )


def _run(check: Callable[[Probe], Finding], probe: Probe) -> Finding:
    try:
        return check(probe)
    except Exception as error:  # of any type, from the code of any family
        kind = "" if isinstance(error, SoloError) else f"{type(error).__name__}: "
        return Finding("fails", f"{kind}{first_line(error)}")


def _kind(probe: Probe) -> str:
    family = probe.model.config.model_type
    kind = "image-text model" if probe.is_foreign else "LLM"
    if probe.sees_images:
        kind, family = "SOLO model", probe.model.config.get_text_config().model_type
    return f"{kind} ({', '.join(part for part in (family, probe.weights) if part)})"
