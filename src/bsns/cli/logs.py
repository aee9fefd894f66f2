"""Log lines on standard error: text for people, or JSON for programs, from the level that BSNS_LOG asks for.

Within an answer's tasks they carry its session's id, and in a gateway its request's; never a prompt, an answer or a
key.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, Literal, get_args

import structlog
import typer

from bsns.core.errors import BadOption

LogFormat = Literal["text", "json"]
VARIABLE = "BSNS_LOG_FORMAT"
LogFormatOption = Annotated[
    LogFormat, typer.Option("--log-format", envvar=VARIABLE, metavar="FORMAT", help="Log lines as text or json.")
]


def log_to_stderr(usual: int = logging.WARNING, format_: LogFormat | None = None) -> None:
    """Our own log at BSNS_LOG, or the `usual` level; libraries only when they warn. BSNS_LOG_FORMAT says what `format_`
    does not. Raises BadOption where it names no format."""
    level = logging.getLevelNamesMapping().get(os.environ.get("BSNS_LOG", "").upper(), usual)
    chosen = format_ or os.environ.get(VARIABLE) or "text"
    if chosen not in get_args(LogFormat):
        raise BadOption(f"{VARIABLE} is {chosen!r}; give {' or '.join(get_args(LogFormat))}")
    as_json = chosen == "json"
    came: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # The usual renderer prints every frame's variables with a traceback: keys and invites would be among them. And
    # colours, wherever the lines go.
    plain = structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty() and not os.environ.get("NO_COLOR"),
        exception_formatter=structlog.dev.plain_traceback,
    )
    told: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)] if as_json else [plain]
    )
    structlog.configure(
        processors=[*came, *told],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # asked at every use: standard error may be another one by then
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )
    if as_json:
        handler = logging.StreamHandler(sys.stderr)
        foreign = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, *told]
        handler.setFormatter(structlog.stdlib.ProcessorFormatter(processors=foreign, foreign_pre_chain=came))
        logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    else:
        logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
