"""`solo eval run`: a model on the paper's benchmarks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from solo_vlm.cli._common import STDOUT, print_json, progress_bar, quiet_libraries
from solo_vlm.cli.eval._judge import JudgeModel, JudgeUrl, benchmark_of
from solo_vlm.cli.eval._scores import print_score
from solo_vlm.cli.eval._tasks import DataRoot, Tasks, task_names
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from solo_vlm.evaluate.backends import Backend
    from solo_vlm.evaluate.run import ModelFacts

_VLLM_URL = "http://localhost:8000/v1"


def run(
    model: Annotated[str, typer.Option(help="Folder or hub id of a SOLO model; or a served model's name.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; one that was stopped goes on.")],
    tasks: Tasks = None,
    data_root: DataRoot = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows of each task, from the first.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in place of what the tasks say.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Chats that are answered at once.")] = 8,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: as stored.")
    ] = "auto",
    engine: Annotated[
        Literal["transformers", "vllm", "openai"],
        typer.Option(help="Run the model here, or ask a served one through its OpenAI API."),
    ] = "transformers",
    base_url: Annotated[
        str | None, typer.Option(help=f"Of the API, up to /v1. Default for vllm: {_VLLM_URL}.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Of the API. Default: OPENAI_API_KEY.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests to the API under way at a time.")] = 8,
    judge: JudgeModel = None,
    judge_url: JudgeUrl = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Put a benchmark's questions to a model, score the answers as the papers do, and write a report."""
    _quiet_harness()
    from solo_vlm.evaluate.data_root import load_benchmark
    from solo_vlm.evaluate.rows import Rows
    from solo_vlm.evaluate.run import EvaluationRun

    names = task_names(tasks)
    if engine == "transformers" and (base_url or api_key):
        raise SoloError(
            "--base-url and --api-key are for a served model: add --engine vllm or --engine openai"
        )
    if judge and "mathvista" not in names:
        raise SoloError("--judge is for mathvista, which is not among the tasks")
    judged = {name: (judge, judge_url) if name == "mathvista" else (None, None) for name in names}
    benchmarks = [benchmark_of(name, *judged[name]) for name in names]
    opened = [(each, Rows.of(each, load_benchmark(each, data_root))) for each in benchmarks]
    if engine == "transformers":
        answers, facts = _local(model, dtype, batch_size)
    else:
        answers, facts = _served(model, engine, base_url, api_key, concurrency)
    scores = EvaluationRun(out, facts, limit, max_new_tokens).evaluate(answers, opened, progress_bar)
    if json:
        print_json(
            {"out": str(out), "model": facts.as_dict(), "scores": [score.as_dict() for score in scores]}
        )
        return
    for score in scores:
        print_score(score)
    STDOUT.print(f"report: {out / 'report.html'}", highlight=False)


def _local(model: str, dtype: str, batch_size: int) -> tuple[Backend, ModelFacts]:
    from solo_vlm.evaluate.run import ModelFacts
    from solo_vlm.evaluate.weights import weights_hash
    from solo_vlm.generate import BatchGenerator, GenerationPipeline

    pipeline = GenerationPipeline.from_pretrained(model, dtype)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "PROMPT"}]}]
    more = {
        "dtype": str(pipeline.model.dtype).removeprefix("torch."),
        "chat": pipeline.processor.apply_chat_template(chat, add_generation_prompt=True),
    }
    facts = ModelFacts(model, "transformers", weights_hash(model), more)
    return BatchGenerator(pipeline, batch_size), facts


def _served(
    model: str, engine: str, base_url: str | None, api_key: str | None, concurrency: int
) -> tuple[Backend, ModelFacts]:
    from solo_vlm.evaluate.backends import ServerBackend
    from solo_vlm.evaluate.run import ModelFacts

    if engine == "vllm":
        base_url = base_url or _VLLM_URL
        api_key = api_key or os.environ.get("OPENAI_API_KEY", "none")  # it asks for a key only where told to
    facts = ModelFacts(model, engine, more={"base_url": base_url} if base_url else {})
    return ServerBackend(model, base_url, api_key, concurrency), facts


def _quiet_harness() -> None:
    """Keep lmms-eval's log and progress bars off the terminal; ours says what there is to say."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    quiet_libraries()
    try:
        from loguru import logger
    except ImportError:  # said with a remedy where lmms-eval is needed
        return
    logger.disable("lmms_eval")
