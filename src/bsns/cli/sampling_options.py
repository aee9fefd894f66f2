"""The sampling options that `up`, `generate` and `chat` share."""

from __future__ import annotations

from typing import Annotated

import typer

Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token every time.")]
TopK = Annotated[int, typer.Option("--top-k", help="Keep the k likeliest tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Keep the likeliest tokens that make up this probability.")]
MinP = Annotated[float, typer.Option("--min-p", help="Keep tokens at least this fraction as likely as the likeliest.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1 makes tokens already used less likely.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same answer.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="End the answer before this text; may be repeated.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="The longest answer, in tokens.")]
