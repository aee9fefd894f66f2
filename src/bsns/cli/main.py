"""The `bsns` command."""

from __future__ import annotations

import os

# Before torch loads: its allocator then asks for 2 MiB pages, which are read faster.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import typer

import bsns
from bsns.cli import bench, chat, generate, serve, status, up

app = typer.Typer(
    name="bsns",
    help="Run language models too large for one machine across the machines you already have.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("up")(up.up)
app.command("serve")(serve.serve)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("status")(status.status)
app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bsns {bsns.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    app()


if __name__ == "__main__":
    main()
