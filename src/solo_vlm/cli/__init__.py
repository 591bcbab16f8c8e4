"""Command line `solo`: one module per command, with heavy imports deferred until it runs.

May import: check, convert, data, evaluate, experiments, generate, hub, models, quickstart, serve, train,
utils.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

import typer
from rich.logging import RichHandler

from solo_vlm.cli._common import STDERR, is_first_process
from solo_vlm.cli.ablate import ablate
from solo_vlm.cli.chat import chat
from solo_vlm.cli.check import check
from solo_vlm.cli.convert import app as convert
from solo_vlm.cli.data import app as data
from solo_vlm.cli.eval import app as evaluate
from solo_vlm.cli.generate import generate
from solo_vlm.cli.init import init
from solo_vlm.cli.inspect import inspect
from solo_vlm.cli.push import push
from solo_vlm.cli.quickstart import quickstart
from solo_vlm.cli.scaling import app as scaling
from solo_vlm.cli.serve import serve, web
from solo_vlm.cli.train import train
from solo_vlm.utils.errors import SoloError
from solo_vlm.utils.files import explain_os_error

app = typer.Typer(
    name="solo",
    help="Train, evaluate and serve single-transformer vision-language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def _settings(
    debug: bool = typer.Option(False, "--debug", help="Show tracebacks of errors."),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Show log messages."),
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=STDERR, show_path=False)],
    )
    logging.getLogger("huggingface_hub").propagate = False  # it prints its lines itself
    if not verbose:
        # If torchao is installed, transformers imports it with every model, and it warns about kernels that
        # this machine lacks and nothing here calls.
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)
    # An image file can cause hundreds of warnings, and a full pipe behind stderr blocks the process.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if is_first_process():  # one process says which format it took data for
        logging.getLogger("solo_vlm.data.sources").setLevel(logging.INFO)


for verb in (quickstart, init, check, generate, chat, web, serve, inspect, train, ablate, push):
    app.command()(verb)
app.add_typer(data, name="data")
app.add_typer(convert, name="convert")
app.add_typer(scaling, name="scaling")
app.add_typer(evaluate, name="eval")


def main() -> None:
    """Run the command `solo`.

    A `SoloError`, and an error of the operating system for reading or writing a file, is printed as one line
    and sets the exit status.
    """
    # Bound the time that OpenMP threads spin at barriers: on a busy machine, unbounded spinning takes the
    # core from the thread that the others wait for, and training almost stops.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        _run(arguments)
    except SoloError as error:
        if debug:
            raise
        # An error common to all processes of torchrun is printed by the main process alone.
        if not error.raised_by_all or is_first_process():
            print(f"solo: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("solo: stopped", file=sys.stderr)
        sys.exit(130)


def _run(arguments: list[str]) -> None:
    try:
        try:
            app(arguments)
        finally:
            _flush_output()
    except Exception as error:
        explained = None if isinstance(error, SoloError) else explain_os_error(error)
        if explained is None:
            raise
        raise explained from error


def _flush_output() -> None:
    """Write what stdout has buffered; at exit, Python would report a failure in several lines."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has seen enough
            raise SystemExit(1) from None
        raise
