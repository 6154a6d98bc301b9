"""The Typer application, its exit codes, and the one place where errors become sentences.

Exit codes: 0 all done; 1 some items failed, each named in `failures.jsonl`; 2 the request itself is wrong; 75 something
outside (a server, the network) did not answer, and the same command may succeed later.
"""

from __future__ import annotations

import errno
import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from timesearch.base.errors import ItemError, TemporaryError, TimeSearchError
from timesearch.base.extras import missing_extra
from timesearch.base.redaction import redact
from timesearch.base.untrusted import mend_text

app = typer.Typer(
    name="timesearch",
    help="Find the moments of a long video that answer a question, and learn to do it better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
ParamsOption = Annotated[Path, typer.Option("--params", help="Parameter file.")]
"""`params: ParamsOption = Path("params.yaml")` in every stage command."""

_GROUPS = ("data", "learning", "inference", "library", "evaluation", "judge", "encoder", "machine", "protocol")
_errors = Console(stderr=True, soft_wrap=True)


@app.callback()
def _root(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Read by `main`, which looks for --debug before the commands run."""


def say(text: str) -> None:
    """Print a closing line: what was made, where, and what to do next."""
    typer.echo(text)


def visible(text: str) -> str:
    """Text on one line, without secrets: line breaks and control characters of names and rows are shown as escapes."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in redact(text))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave the process with an exit code of the contract."""
    for group in _GROUPS:
        importlib.import_module(f"timesearch.cli.{group}")
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--debug" in arguments:
        app(arguments)
    try:
        app(arguments)
    except ItemError as error:
        _stop(str(error), 1)
    except TemporaryError as error:
        _stop(str(error), 75)
    except TimeSearchError as error:
        _stop(str(error), 2)
    except ImportError as error:
        if (missing := missing_extra(error)) is None:
            raise
        _stop(str(missing), 2)
    except SystemExit as ended:
        # Typer makes this of a Ctrl-C, without a word.
        if ended.code == 130:
            _stop("stopped; what is done is kept, and the same command goes on from there", 130)
        raise
    except OSError as error:
        known = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EADDRINUSE, errno.EACCES, errno.EROFS)
        if error.errno not in known:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _stop(f"{error.strerror}{where}: nothing half-written was left; make room or choose another place", 2)


def _stop(text: str, code: int) -> None:
    _errors.print(redact(mend_text(f"timesearch: {text}")), markup=False, highlight=False)
    raise SystemExit(code)
