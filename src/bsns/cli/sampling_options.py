"""The sampling options that `up`, `generate` and `chat` share."""

from __future__ import annotations

from typing import Annotated

import typer

Temperature = Annotated[
    float, typer.Option("--temperature", metavar="T", help="0 takes the likeliest token every time.")
]
TopK = Annotated[int, typer.Option("--top-k", metavar="K", help="Keep the K likeliest tokens; 0 keeps all.")]
TopP = Annotated[
    float, typer.Option("--top-p", metavar="P", help="Keep the likeliest tokens that make up this probability.")
]
MinP = Annotated[
    float, typer.Option("--min-p", metavar="P", help="Keep tokens at least this fraction as likely as the likeliest.")
]
Penalty = Annotated[
    float, typer.Option("--repetition-penalty", metavar="X", help="Above 1 makes tokens already used less likely.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="The same seed gives the same answer.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="End the answer before this text; may be repeated.")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", metavar="N", help="The longest answer, in tokens.")]
RawFlag = Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")]
