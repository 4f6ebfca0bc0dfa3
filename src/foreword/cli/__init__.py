"""The command line: one file per command, no logic. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import logging
import os

import typer

from .. import processes
from ..errors import ForewordError
from . import compose, cut, export, generate, import_, inspect, joint, predict, serve, train, tune
from . import eval as eval_command

app = typer.Typer(
    name="foreword",
    help="Prefix-tuning: teach one frozen language model many jobs, a small prefix for each.\n\n"
    "Example: foreword train --output runs/news   (SmolLM2-135M on BBC News)",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("train")(train.command)
app.command("joint")(joint.command)
app.command("tune")(tune.command)
app.command("eval")(eval_command.command)
app.command("predict")(predict.command)
app.command("generate")(generate.command)
app.command("inspect")(inspect.command)
app.command("compose")(compose.command)
app.command("cut")(cut.command)
app.command("serve")(serve.command)
app.command("export")(export.command)
app.command("import")(import_.command)


def main() -> None:
    """Run the command line. What is wrong is said in one sentence: exit code 2 for bad input, 1 for failed work."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it once; a third less peak memory in training
    # It misses a kernel for packed weights, at import; `bases.keep_unpacked` leaves none.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        app()
    except SystemExit as end:  # typer's own, of success too
        processes.leave(end.code if isinstance(end.code, int) else 0)
    except ForewordError as error:
        processes.complain(str(error), error.everywhere)
        processes.leave(error.exit_code)
    except KeyboardInterrupt:
        processes.complain("interrupted.", everywhere=True)
        processes.leave(1)
    except OSError as error:
        processes.complain(f"{error.filename or 'a file'}: {error.strerror or error}.")
        processes.leave(1)
    except Exception:
        processes.let_the_first_speak()
        raise
