"""The command line `solo`: one small file a verb; heavy imports wait until a verb runs."""

from __future__ import annotations

import logging
import os
import sys

import typer
from rich.logging import RichHandler

from solo_vlm.cli._common import STDERR
from solo_vlm.cli.ablate import ablate
from solo_vlm.cli.chat import chat
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

app = typer.Typer(
    name="solo",
    help="Single-transformer vision-language models: train, ask, inspect.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def _settings(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Log what happens."),
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=STDERR, show_path=False)],
    )


for verb in (quickstart, init, generate, chat, web, serve, inspect, train, ablate, push):
    app.command()(verb)
app.add_typer(data, name="data")
app.add_typer(convert, name="convert")
app.add_typer(scaling, name="scaling")
app.add_typer(evaluate, name="eval")


def main() -> None:
    """Entry point of the command `solo`. An error that the user can mend: one line, and its exit code."""
    # OpenMP's threads wait for each other by spinning. On a busy machine, spinning for ever (the default)
    # takes the core from the thread that is waited for, and training all but stands still.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments)
    except SoloError as error:
        if debug:
            raise
        # Processes that torchrun has started are stopped together: the first one says so for all.
        if not error.is_common or os.environ.get("RANK", "0") == "0":
            print(f"solo: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("solo: stopped", file=sys.stderr)
        sys.exit(130)
