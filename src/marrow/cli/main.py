"""The `marrow` command: verbs that follow the folders, imported only when used.

stdout is data, stderr is talk. Exit status: 0 done, 1 failed, 2 asked wrongly, 130 interrupted.
`marrow --help` loads neither rich nor torch: the table below is all it reads.
"""

import os
import sys

import click

from marrow import __version__
from marrow.cli.verbs import Verbs
from marrow.core.errors import Interrupted, MarrowError, refusal_of

# PERF: libgomp's waiting threads spin 300,000 times before they sleep. Beside another busy process even
# 200,000 make a training step on two threads 12 times slower (999 for 84 ms). With 10,000 turns it is 295 ms
# there, and no slower on an idle machine (83 ms; at once asleep: 147 ms). Read when torch loads.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

VERBS = {  # verb: (module, what it does)
    "run": ("marrow.cli.run", "Run a recipe: raw rows in, a served and measured model out."),
    "data": ("marrow.cli.data.group", "Version, compare, check and query datasets."),
    "serve": ("marrow.cli.serve", "Serve a model over HTTP (OpenAI API), with a page at /."),
    "complete": ("marrow.cli.complete", "Type a beginning and watch a model go on."),
    "chat": ("marrow.cli.chat", "Talk with a chat-tuned model."),
    "lineage": ("marrow.cli.lineage", "Show what made an artifact, down to the source."),
    "why": ("marrow.cli.why", "Show where the time of a run went, and name the bottleneck."),
    "export": ("marrow.cli.export", "Copy an artifact's files to a folder of your own."),
    "config": ("marrow.cli.config", "Show a recipe resolved: every value and where it came from."),
    "doctor": ("marrow.cli.doctor", "Show this machine: devices, measured peaks, kernels chosen."),
    "bench": ("marrow.cli.bench", "Measure a layer, or any OpenAI-compatible server."),
}


@click.group(cls=Verbs, table=VERBS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="marrow")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Marrow: from raw rows to a served model, one lineage graph."""


def main() -> None:
    """Run the command line and exit with its status."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; turn its end into an exit status and, if it failed, a message on stderr."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        # Not cli.main(): it would end the process itself when the reader of stdout has gone.
        with cli.make_context("marrow", list(arguments)) as context:
            cli.invoke(context)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except (Interrupted, KeyboardInterrupt, click.Abort) as error:
        if debug and not isinstance(error, Interrupted):
            raise
        click.echo(f"interrupted{f': {error}' if str(error) else ''}", err=True)
        click.echo("hint: finished work is kept; the same command goes on from there", err=True)
        return 130
    except MarrowError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except BrokenPipeError:  # the reader of stdout has gone, as in `marrow lineage x | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and (told := refusal_of(error, "go on", str(error.filename))):
            click.echo(f"error: {told}", err=True)
            return told.exit_code
        click.echo(f"error: {type(error).__name__}: {error}", err=True)
        click.echo("hint: this is a bug in Marrow; --debug shows the traceback for a report", err=True)
        return 1
    return 0
