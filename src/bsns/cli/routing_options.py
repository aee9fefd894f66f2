"""What a user may ask of the route, as `generate`, `chat` and `up` share it."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

WEIGHTS_HELP = (
    "Choose nodes by weights instead: fast, cheap, trusted or attested-only, and what differs from it, such "
    "as cheap,latency=2. Weights: work, latency, memory, reputation, price, lookahead."
)
Objective = Annotated[
    Literal["latency", "throughput"],
    typer.Option("--objective", help="What routes are chosen for: one token's time, or that of the slowest stage."),
]
WarmSpares = Annotated[
    bool,
    typer.Option(
        "--warm-spares",
        help="Let other nodes compute every step along, so that a lost node is replaced at once. Costs as much again.",
    ),
]
Speculate = Annotated[
    bool,
    typer.Option(
        "--speculate/--no-speculate",
        help="Guess the next tokens from what stood before, and have them checked along where that saves time. Answers "
        "are the same.",
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="MODEL",
        help="Have a small model with the same tokens guess in this process what did not stand before.",
    ),
]
Wire = Annotated[
    Literal["auto", "none", "bf16", "int8", "int8-dyn", "int8-rot", "int4"],
    typer.Option(
        "--wire",
        help="What activations travel in: auto is int8-rot on ways where that is faster, and none, as they are, on "
        "others and in float32.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="TEXT",
        help=WEIGHTS_HELP,
    ),
]
