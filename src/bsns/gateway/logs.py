"""Log lines of a gateway: each carries its request's id; never a prompt, an answer or a key."""

from __future__ import annotations

import logging
import os
import sys

import structlog


def log_requests(*, as_json: bool) -> None:
    """A line for every request on standard error, and whatever BSNS_LOG (default: info) asks for of the rest."""
    level = logging.getLevelNamesMapping().get(os.environ.get("BSNS_LOG", "").upper(), logging.INFO)
    plain = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([structlog.processors.format_exc_info, structlog.processors.JSONRenderer()] if as_json else [plain]),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )
