"""The `bsns` command."""

from __future__ import annotations

import inspect
import os
import signal
from collections.abc import Callable
from typing import Any

# Before torch loads, and for the nodes we start: its allocator then asks for 2 MiB pages for tensors from 2 MiB on.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import typer

import bsns
from bsns.cli import bench, chat, doctor, eval, gateway, generate, plan, schemas, serve, simulate, status, topology, up
from bsns.cli.console import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER, leave, say_error
from bsns.cli.streams import replace_what_cannot_be_encoded

app = typer.Typer(
    name="bsns",
    help="Run language models too large for one machine across the machines you already have.",
    epilog='Begin with: bsns up smollm2-135m --prompt "What is the capital of France?"',
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)

# Typer brings its own click, whose names are private; this is click's UsageError in either case.
_UsageError: Any = typer.BadParameter.__base__


def _add(name: str, verb: Callable[..., None]) -> None:
    """A verb, with its docstring as help: each paragraph is reflowed, an example keeps its line."""
    paragraphs = inspect.cleandoc(verb.__doc__ or "").split("\n\n")
    prose = [text if text.startswith("Example:") else text.replace("\n", " ") for text in paragraphs]
    app.command(name, help="\n\n".join(prose))(verb)


_add("up", up.up)
_add("serve", serve.serve)
_add("generate", generate.generate)
_add("chat", chat.chat)
_add("status", status.status)
_add("doctor", doctor.doctor)
_add("plan", plan.plan)
_add("topology", topology.topology)
_add("simulate", simulate.simulate)
app.add_typer(gateway.app, name="gateway", help="Serve a swarm's model with OpenAI's HTTP API.")
app.add_typer(schemas.app, name="schemas")
app.add_typer(bench.app, name="bench")
app.add_typer(eval.app, name="eval")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bsns {bsns.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def command() -> int:
    """Run the command line; its status. A mistake in its use is one line on standard error, as every other error is."""
    try:
        return int(app(prog_name="bsns", standalone_mode=False) or 0)
    except _UsageError as error:
        if not error.format_message() or type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            path = error.ctx.command_path if error.ctx is not None else "bsns"
            say_error(f"{error.format_message()} ({path} --help shows how)")
        return EXIT_USER
    except (typer.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read the help has gone
        return EXIT_FAILED
    except OSError as error:
        say_error(f"the output cannot be written: {error.strerror or error}")
        return EXIT_FAILED


def main() -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # until now it ended us at once: see bsns.cli
    replace_what_cannot_be_encoded()
    # Everything is in order by now; taking torch and its friends apart piece by piece would cost another second or two.
    leave(command())


if __name__ == "__main__":
    main()
