"""A sweep as typed settings: sizes of a decoder, budgets, and the recipe of every run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from solo_vlm.quickstart.data.drawn import ToySettings
from solo_vlm.utils.settings import Settings, find_settings, override, read_settings

Size = dict[str, PositiveInt]


class HoldoutSettings(Settings):
    """A run that no law is fitted to; the law has to predict its loss.

    Attributes:
        name: of the size.
        size: settings of the decoder's configuration.
        tokens: to train on.
    """

    name: str
    size: Size
    tokens: PositiveInt


class SweepSettings(Settings):
    """Sizes x budgets, each one run of the training engine.

    The decoders start from random weights. Their learning rate follows their width as in muP for Adam (Yang
    et al. 2022, "Tensor Programs V", table 3): rates of matrices go with 1 / width, their initial spread with
    width^-1/2; the patch embedding, whose 3,072 inputs are the same in every size, keeps its own rate. Keep
    the size of the heads the same, too. Unlike in muP, the token embedding follows the matrices.

    Attributes:
        root: folder of the sweep; data and `llm` count from it.
        llm: folder or hub id of an LLM: the architecture and the tokenizer of all sizes.
        toy_data: draw the embedded toy data first, and make `llm` from them where it is missing.
        recipe: settings of every run, but for `root`, `model`, `out` and `steps`; with validation data.
        base_width: the hidden size that the recipe's learning rates are for.
        sizes: by name, what they change in the LLM's configuration (`hidden_size`, `num_hidden_layers`, ...).
        tokens: budgets in tokens, the same for every size; or else
        flops: budgets C in FLOPs, for IsoFLOP profiles: a size of N parameters sees D = C / (6 N) tokens.
        count: which parameters are N.
        holdout: runs to predict.
    """

    root: str
    llm: str
    toy_data: ToySettings | None = None
    recipe: dict[str, Any]
    base_width: PositiveInt
    sizes: dict[str, Size] = Field(min_length=1)
    tokens: tuple[PositiveInt, ...] = ()
    flops: tuple[PositiveFloat, ...] = ()
    count: Literal["non_embedding", "total"] = "non_embedding"
    holdout: tuple[HoldoutSettings, ...] = ()

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a file, or a sweep of the package by its name, as `sweeps/toy`; overrides are `a.b=value`.

        Raises:
            SoloError: no such file, or a key or value that does not belong there.
        """
        settings = read_settings(find_settings(path, "sweep"), "sweep")
        return cls.parse(override(settings, overrides), origin=str(path))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.tokens) == bool(self.flops):
            raise ValueError("give budgets either as tokens or as flops")
        if not self.recipe.get("validation"):
            raise ValueError("recipe.validation is missing: a law is fitted to losses on held-out data")
        if taken := {"root", "model", "out", "steps"} & self.recipe.keys():
            raise ValueError(f"recipe.{min(taken)} is set by the sweep: remove it")
        sizes = [*self.sizes.values(), *(holdout.size for holdout in self.holdout)]
        if not all("hidden_size" in size for size in sizes):
            raise ValueError("every size needs a hidden_size: the learning rate follows it")
        names = [*self.sizes, *(holdout.name for holdout in self.holdout)]
        if len(set(names)) < len(names):
            raise ValueError("a holdout has the name of another size")
        return self
