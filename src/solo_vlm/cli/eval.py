"""`solo eval`: evaluate a model on benchmarks, score saved predictions, compare runs, find contamination."""

from __future__ import annotations

import json as json_format
import os
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from solo_vlm.cli._common import (
    STDERR,
    STDOUT,
    JsonOption,
    print_json,
    print_table,
    print_whole,
    progress_bar,
    quiet_libraries,
)
from solo_vlm.utils.errors import SoloError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from solo_vlm.evaluate.backends import Backend
    from solo_vlm.evaluate.data import Rows
    from solo_vlm.evaluate.run import ModelInfo
    from solo_vlm.evaluate.scoring.score import Benchmark, Part, Score
    from solo_vlm.evaluate.stock_tasks import StockTask

_VLLM_URL = "http://localhost:8000/v1"

app = typer.Typer(
    help="Evaluation: run a model on the paper's benchmarks, score saved predictions, compare runs.",
    no_args_is_help=True,
)

Tasks = Annotated[
    str | None, typer.Option(help="Comma-separated names, such as mmstar,mme. Default: the paper's six.")
]
AnyTasks = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        help="Comma-separated names, such as mmstar,pope; also of lmms-eval's tasks, groups and tags. "
        "Default: the paper's six.",
    ),
]
DataRoot = Annotated[
    Path | None, typer.Option(help="Folder with one folder per benchmark. Default: the hub.")
]
JudgeModel = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="MathVista: extract answers with this LLM judge, not by rules."),
]
JudgeUrl = Annotated[
    str | None, typer.Option(metavar="URL", help="OpenAI-compatible endpoint of the LLM judge, up to /v1.")
]


@app.command()
def run(
    model: Annotated[
        str, typer.Option(help="Folder or hub ID of a SOLO model, or the name of a served model.")
    ],
    out: Annotated[Path, typer.Option(help="Output folder; an interrupted run resumes.")],
    tasks: AnyTasks = None,
    questions: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Instead of tasks: a file of questions, or `validation.questions` of a recipe.",
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with further task files of lmms-eval, read recursively.")
    ] = None,
    data_root: DataRoot = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of rows per task, from the first.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum length of an answer, overriding the tasks.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Chats per batch.")] = 8,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto: as stored.")
    ] = "auto",
    engine: Annotated[
        Literal["transformers", "vllm", "openai"],
        typer.Option(help="Run the model here, or query a served one through its OpenAI API."),
    ] = "transformers",
    base_url: Annotated[
        str | None, typer.Option(help=f"URL of the API, up to /v1. Default for vllm: {_VLLM_URL}.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(help="Key of the API. Default: OPENAI_API_KEY.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Maximum in-flight requests to the API.")] = 8,
    judge: JudgeModel = None,
    judge_url: JudgeUrl = None,
    json: JsonOption = False,
) -> None:
    """Evaluate a model on benchmarks: generate answers, score them as the papers do, write a report.

    A task that is no benchmark of `solo eval rescore` is run with lmms-eval's own data, prompts and scores.
    """
    _quiet_harness()
    from solo_vlm.evaluate.question_run import QuestionRun, load_files
    from solo_vlm.evaluate.questions import DEFAULT_MAX_NEW_TOKENS, parse_question_files
    from solo_vlm.evaluate.run import EvaluationRun

    if questions and tasks:
        raise SoloError("give either --tasks or --questions: a run has one kind of report")
    names = [] if questions else _task_names(tasks)
    files = load_files(parse_question_files(questions)) if questions else {}
    if engine == "transformers" and (base_url or api_key):
        raise SoloError("--base-url and --api-key need a served model: add --engine vllm or --engine openai")
    if judge and "mathvista" not in names:
        raise SoloError("--judge needs mathvista among the tasks")
    benchmarks = {"mathvista": _benchmark("mathvista", judge, judge_url)} if judge or judge_url else {}
    opened, failed = _open_tasks(names, benchmarks, include_path, data_root) if names else ([], {})
    if engine == "transformers":
        backend, info = _local(model, dtype, batch_size)
    else:
        backend, info = _served(model, engine, base_url, api_key, concurrency)
    if questions:
        asked = QuestionRun(out, info, limit, max_new_tokens or DEFAULT_MAX_NEW_TOKENS)
        scores = asked.evaluate(backend, files, progress_bar)
    else:
        run = EvaluationRun(out, info, limit, max_new_tokens)
        scores, failed = run.evaluate(backend, opened, progress_bar, failed)
    if json:
        facts = {"out": str(out), "model": info.as_dict(), "scores": [score.as_dict() for score in scores]}
        print_json({**facts, "failed": failed})
    else:
        for score in scores:
            _print_score(score)
        STDOUT.print(f"report: {out / 'report.html'}")
    for name, reason in failed.items():
        STDERR.print(f"error: {name}: {reason}", markup=False, soft_wrap=True)
    if failed:
        raise typer.Exit(SoloError.exit_code)


@app.command()
def rescore(
    task: Annotated[
        str, typer.Option(help="mmstar, mme, seedbench, ...; any name for answers to a file of questions.")
    ],
    predictions: Annotated[
        Path, typer.Option(help="JSONL, JSON, CSV, TSV or XLSX file, or a folder of MME's text files.")
    ],
    judge: JudgeModel = None,
    judge_url: JudgeUrl = None,
    json: JsonOption = False,
) -> None:
    """Score saved predictions as the benchmark's paper does, without a model.

    Also those of `solo eval run` for files of questions, and for tasks that lmms-eval scores by question.
    """
    from solo_vlm.evaluate.predictions import load_predictions
    from solo_vlm.evaluate.saved_task import rescore as rescore_saved

    if judge or judge_url:
        score = _benchmark(task, judge, judge_url).score(load_predictions(predictions))
    else:
        score = rescore_saved(task, predictions)
    print_json(score.as_dict()) if json else _print_score(score)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder of a run.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Folder of another run.")],
    json: JsonOption = False,
) -> None:
    """Compare two runs, task by task: difference, 95% interval and p-value (paired bootstrap)."""
    from solo_vlm.evaluate.compare import compare_runs
    from solo_vlm.evaluate.run_folder import RunFolder
    from solo_vlm.evaluate.scoring.score import digits

    comparisons, not_compared = compare_runs(RunFolder(first), RunFolder(second))
    if json:
        tasks = [asdict(comparison) for comparison in comparisons]
        facts = {"first": str(first), "second": str(second), "tasks": tasks}
        return print_json({**facts, "not_compared": not_compared})
    STDOUT.print(f"A: {first}\nB: {second}")
    rows = [
        (
            comparison.title,
            f"{comparison.n:,}",
            *(digits(score, comparison.maximum) for score in (comparison.first, comparison.second)),
            digits(comparison.difference, comparison.maximum, "+"),
            " to ".join(digits(end, comparison.maximum, "+") for end in comparison.interval),
            f"{comparison.p_value:.4f}",
        )
        for comparison in comparisons
    ]
    print_table(None, ("task", "rows", "A", "B", "B - A", "95% interval", "p"), rows)
    for comparison in comparisons:
        if comparison.left_out:
            STDOUT.print(f"{comparison.title}: {comparison.left_out:,} rows of only one run are left out")
    for reason in not_compared.values():
        STDOUT.print(f"not compared: {reason}", markup=False, soft_wrap=True)
    STDOUT.print(
        "On the rows that both runs have, scored by rules, lmms-eval's tasks by its own values. Paired "
        "bootstrap over questions (over images for MME), 10,000 resamples."
    )


@app.command()
def contamination(
    mixture: Annotated[str, typer.Option(help="YAML file of a mixture or a recipe, or a recipe's name.")],
    out: Annotated[Path, typer.Option(help="Folder for contamination.json and a page with the matches.")],
    tasks: Tasks = None,
    data_root: DataRoot = None,
    distance: Annotated[
        int, typer.Option(min=0, max=16, help="Maximum Hamming distance of two images' 64-bit hashes.")
    ] = 4,
    workers: Annotated[int, typer.Option(min=0, help="Number of worker processes; 0 uses this one.")] = 0,
    json: JsonOption = False,
) -> None:
    """Search a training mixture for images and questions of benchmarks."""
    quiet_libraries()
    from solo_vlm.data.mixture import Mixture
    from solo_vlm.evaluate.benchmarks import get
    from solo_vlm.evaluate.contamination.check import check_mixture, write_page
    from solo_vlm.evaluate.data import Rows, load_benchmark
    from solo_vlm.utils.files import write_text

    settings = Mixture.load(mixture)
    benchmarks = {
        name: Rows.of(get(name), load_benchmark(get(name), data_root)) for name in _task_names(tasks)
    }
    with progress_bar("reading") as on_progress:
        found = check_mixture(benchmarks, settings, distance, workers, on_progress)
    result = {"mixture": mixture, **found.as_dict()}
    write_text(out / "contamination.json", json_format.dumps(result, ensure_ascii=False, indent=2) + "\n")
    write_page(out / "contamination.html", mixture, found, benchmarks)
    if json:
        return print_json(result)
    rows = [
        (
            task,
            *(f"{count:,}" for count in (findings.rows, findings.images)),
            f"{len(findings.image_matches):,} rows",
            f"{findings.questions:,}",
            f"{len(findings.question_matches):,} rows",
        )
        for task, findings in found.tasks.items()
    ]
    print_table(None, ("task", "rows", "images", "found", "questions", "found"), rows)
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in found.skipped.items())
    STDOUT.print(
        f"in {found.training_rows:,} rows with {found.training_images:,} images"
        + (f" (skipped: {skipped})" if skipped else "")
    )
    STDOUT.print(f"matches: {out / 'contamination.html'}")


def _task_names(tasks: str | None) -> list[str]:
    """Return the names of an option in order, without duplicates."""
    from solo_vlm.evaluate.benchmarks import PAPER

    if not tasks:
        return list(PAPER)
    return list(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))


def _open_tasks(
    names: Sequence[str],
    benchmarks: Mapping[str, Benchmark],
    include_path: Path | None,
    data_root: Path | None,
) -> tuple[list[tuple[Benchmark, Rows] | StockTask], dict[str, str]]:
    """Load benchmarks and lmms-eval's tasks of these names; also return the reasons of those that fail.

    Raises:
        SoloError: A name is unknown, or none can be loaded.
    """
    from solo_vlm.evaluate.benchmarks import BENCHMARKS
    from solo_vlm.evaluate.data import Rows, load_benchmark
    from solo_vlm.evaluate.run import check_harness

    check_harness()
    from solo_vlm.evaluate.stock_tasks import TaskError, TaskFiles, open_stock_task

    task_files = TaskFiles(include_path)
    ours = BENCHMARKS.keys() - task_files.included.keys()
    files: dict[str, Path | None] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            files |= {name: None} if name in ours else task_files.resolve(name)
        except TaskError as error:
            failed[name] = str(error)
    opened: list[tuple[Benchmark, Rows] | StockTask] = []
    for name, file in files.items():
        try:
            if file is None or name in ours:
                benchmark = benchmarks.get(name, BENCHMARKS[name])
                opened.append((benchmark, Rows.of(benchmark, load_benchmark(benchmark, data_root))))
            else:
                opened.append(open_stock_task(name, file, data_root))
        except SoloError as error:
            failed[name] = str(error)
    if not opened:
        raise SoloError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    return opened, failed


def _benchmark(task: str, judge: str | None, judge_url: str | None) -> Benchmark:
    """Return the benchmark of a name, with an LLM judge if one is given."""
    from solo_vlm.evaluate.benchmarks import get
    from solo_vlm.evaluate.benchmarks.mathvista import MATHVISTA, LlmJudge, with_llm_judge

    benchmark = get(task)
    if judge is None:
        if judge_url is not None:
            raise SoloError("--judge-url needs --judge MODEL: the name of the model there")
        return benchmark
    if benchmark is not MATHVISTA:
        raise SoloError(f"--judge is for mathvista only; answers to {task} are extracted by rules")
    return with_llm_judge(LlmJudge(judge, judge_url))


def _local(model: str, dtype: str, batch_size: int) -> tuple[Backend, ModelInfo]:
    from solo_vlm.evaluate.run import ModelInfo
    from solo_vlm.evaluate.run_folder import weights_hash
    from solo_vlm.generate import BatchGenerator, GenerationPipeline

    pipeline = GenerationPipeline.from_pretrained(model, dtype)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "PROMPT"}]}]
    more = {
        "dtype": str(pipeline.model.dtype).removeprefix("torch."),
        "chat": pipeline.processor.apply_chat_template(chat, add_generation_prompt=True),
    }
    info = ModelInfo(model, "transformers", weights_hash(model), more)
    return BatchGenerator(pipeline, batch_size), info


def _served(
    model: str, engine: str, base_url: str | None, api_key: str | None, concurrency: int
) -> tuple[Backend, ModelInfo]:
    from solo_vlm.evaluate.backends import ServerBackend
    from solo_vlm.evaluate.run import ModelInfo

    if engine == "vllm":
        base_url = base_url or _VLLM_URL
        api_key = api_key or os.environ.get("OPENAI_API_KEY", "none")  # vLLM checks keys only on request
    info = ModelInfo(model, engine, more={"base_url": base_url} if base_url else {})
    return ServerBackend(model, base_url, api_key, concurrency), info


def _quiet_harness() -> None:
    """Silence lmms-eval's logs and progress bars in favor of ours."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    quiet_libraries()
    try:
        from loguru import logger
    except ImportError:  # reported where lmms-eval is imported
        return
    logger.disable("lmms_eval")


def _print_score(score: Score) -> None:
    """Print a score with its categories and how it is computed."""
    from rich.table import Table

    more = list(dict.fromkeys(name for part in score.breakdown.values() for name in part.more))
    table = Table(title=score.name, title_justify="left", title_style="bold", show_edge=False)
    table.add_column("", overflow="fold", min_width=20)
    for column in (*(name.replace("_plus", "+") for name in more), "score", "95% interval", "rows"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row("all", *[""] * len(more), *_cells(score), style="bold")
    for _, parts in groupby(score.breakdown.items(), key=lambda item: item[1].group):
        table.add_section()
        for name, part in parts:
            metrics = [f"{part.more[key]:.1f}" if key in part.more else "" for key in more]
            table.add_row(name, *metrics, *_cells(part))
    print_whole(table)
    notes = [f"score: {score.metric}", f"source: {score.source}"]
    notes += [f"{name}: {value:.2f}" for name, value in score.raw.items()]
    if score.unreadable:
        notes.append(f"unreadable answers, counted as wrong: {score.unreadable:,}")
    if score.bad_rows:
        rows = ", ".join(score.bad_rows[:10]) + (", ..." if len(score.bad_rows) > 10 else "")
        notes.append(f"bad rows, counted as wrong: {len(score.bad_rows):,} (rows {rows})")
    if score.filtered:
        notes.append(f"rows filtered out, not part of this score: {score.filtered:,}")
    for note in notes:
        STDOUT.print(note)


def _cells(score: Score | Part) -> list[str]:
    from solo_vlm.evaluate.scoring.score import points, span

    return [points(score), span(score), f"{score.n:,}"]
