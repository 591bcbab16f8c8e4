"""What an ablation will train, before it does: arms, stages, steps, and what is there already."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from solo_vlm.experiments.ablations.chain import Link, all_links, make_chains
from solo_vlm.experiments.ablations.settings import BASE, Ablation, describe


def make_plan(ablation: Ablation, fraction: float = 1.0) -> dict[str, Any]:
    """Plain values: `arms`, each with `changes` and `stages`, and what is `missing`.

    A stage has the `steps` of one run, and for each seed the folder of its run and whether that is finished.

    Raises:
        SoloError: as `make_chains`.
    """
    chains = make_chains(ablation, fraction)
    arms: dict[str, Any] = {}
    for chain in chains:
        arm = arms.setdefault(chain.arm, {"changes": _changes(ablation, chain.arm), "stages": {}})
        for stage, link in chain.stages.items():
            planned = arm["stages"].setdefault(stage, {"steps": _steps(link), "runs": {}})
            planned["runs"][str(link.folder)] = link.finished
    missing = [link for link in all_links(chains) if link.run and not link.finished]
    return {
        "ablation": ablation.name,
        "question": ablation.settings.question,
        "seeds": ablation.settings.seeds,
        "arms": arms,
        "missing": {"runs": len(missing), "steps": sum(_steps(link) or 0 for link in missing)},
    }


def plan_table(plan: dict[str, Any]) -> Table:
    """For the terminal."""
    table = Table(title=plan["question"], title_justify="left", show_edge=False)
    for column in ("arm", "changes", "stage", "steps", "finished"):
        table.add_column(column, justify="right" if column in ("steps", "finished") else "left")
    for arm, planned in plan["arms"].items():
        first = (arm, "; ".join(planned["changes"]))
        for stage, runs in planned["stages"].items():
            steps = "" if runs["steps"] is None else f"{runs['steps']:,}"
            table.add_row(*first, stage, steps, f"{sum(runs['runs'].values())} of {len(runs['runs'])}")
            first = ("", "")
        table.add_section()
    return table


def _changes(ablation: Ablation, arm: str) -> list[str]:
    return [] if arm == BASE else describe(ablation.settings.variants[arm])


def _steps(link: Link) -> int | None:
    return link.run.recipe.steps if link.run else None
