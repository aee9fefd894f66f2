"""`bsns bench`: measurements that a stranger can repeat."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, help="Measure this machine; every verb prints one JSON object with --json.")
