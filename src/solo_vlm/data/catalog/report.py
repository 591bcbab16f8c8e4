"""What became of the rows of a conversion."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from solo_vlm.data.sample import SampleError
from solo_vlm.data.values import printable

_EXAMPLES = 3


@dataclass
class Report:
    """Samples made, and rows rejected by reason.

    Attributes:
        samples: rows that became samples.
        images: images in them.
        rejected: rows that did not, by reason.
        examples: the first few of each reason, as "file, row: message".
    """

    samples: int = 0
    images: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def reject(self, where: str, error: SampleError) -> None:
        """Count a row, and remember it if it is among the first of its kind."""
        self.rejected[error.reason] += 1
        self._remember(error.reason, [printable(f"{where}: {error}")])

    def add(self, other: Report) -> None:
        """Take in the report of another piece."""
        self.samples += other.samples
        self.images += other.images
        self.rejected += other.rejected
        for reason, examples in other.examples.items():
            self._remember(reason, examples)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the commonest reason first."""
        rejected = dict(self.rejected.most_common())
        return {
            "samples": self.samples,
            "images": self.images,
            "rejected": rejected,
            "examples": {reason: self.examples[reason] for reason in rejected},
        }

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Report:
        """The report that `as_dict` wrote."""
        return cls(facts["samples"], facts["images"], Counter(facts["rejected"]), facts["examples"])

    def _remember(self, reason: str, examples: list[str]) -> None:
        kept = self.examples.setdefault(reason, [])
        kept += examples[: _EXAMPLES - len(kept)]
