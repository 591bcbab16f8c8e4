"""The process that measures one model: `python -m solo_vlm.experiments.ablations.worker RUN TASK`."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

from solo_vlm.evaluate.held_out import HeldOutAnswer, answer_questions, read_questions
from solo_vlm.experiments.ablations.measure import Result, answers_file, count_samples
from solo_vlm.generate import GenerationPipeline
from solo_vlm.train.parallel.processes import start_processes
from solo_vlm.train.recipe import Recipe, SourceSettings, ValidationSettings
from solo_vlm.train.start import make_model
from solo_vlm.train.validation import Validation
from solo_vlm.utils.files import new_file
from solo_vlm.utils.json_lines import LinesFile

_ALL = 10**9  # sequences


def measure(run: Path, task: str) -> None:
    """Measure the model of a run, and write each result to its file.

    Args:
        run: folder of the run.
        task: JSON: a list of (kind, data, file).

    Raises:
        SoloError: the data cannot be read, or are no questions where these are needed.
    """
    pipeline = cache(lambda: GenerationPipeline.from_pretrained(run / "model"))
    for kind, data, file in json.loads(task):
        if kind == "accuracy":
            result = answered_rightly(pipeline(), data, answers_file(Path(file)))
        else:
            result = held_out_loss(run, data)
        with new_file(Path(file)) as partial:
            partial.write_text(json.dumps(result._asdict()) + "\n")


def answered_rightly(pipeline: GenerationPipeline, data: str, answers: Path) -> Result:
    """The share of right answers to held-out questions.

    Args:
        pipeline: the model.
        data: of the questions.
        answers: file that gets the answers as they come; those that it has already are not asked for again.
    """
    questions = read_questions(data)
    with LinesFile(answers) as file:
        correct = [record["correct"] for record in file.records]
        for batch in answer_questions(questions[len(correct) :], pipeline):
            file.append(map(_record, batch))
            correct += [answer.correct for answer in batch]
    return Result(sum(correct) / len(correct), len(correct))


def held_out_loss(run: Path, data: str) -> Result:
    """The loss of a run's model on what held-out samples say; never on images, whatever the recipe.

    Args:
        run: folder of the run, whose recipe says how sequences are packed.
        data: the samples.
    """
    recipe = Recipe.load(run / "recipe.yaml")
    validation = ValidationSettings(sources=[SourceSettings(path=data)], sequences=_ALL)
    trained = {"model": str(run / "model"), "lora": None, "quantize": None, "trainable": "all"}
    packing = recipe.data.model_copy(update={"vision_loss": False})
    recipe = recipe.model_copy(update={**trained, "validation": validation, "data": packing})
    with start_processes(recipe) as processes:
        model, processor = make_model(recipe, processes)
        return Result(Validation(recipe, processor, processes).loss(model), count_samples(data))


def _record(answer: HeldOutAnswer) -> dict[str, Any]:
    return {name: getattr(answer, name) for name in ("question", "reference", "answer", "correct")}


if __name__ == "__main__":
    measure(Path(sys.argv[1]), sys.argv[2])
