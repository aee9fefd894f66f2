"""The option that sends traces to an OpenTelemetry collector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from bsns.core.errors import BadOption

if TYPE_CHECKING:
    from bsns.node.telemetry import Telemetry

OtlpOption = Annotated[
    str | None,
    typer.Option(
        "--otlp", metavar="URL", help="Send traces to an OpenTelemetry collector, for example http://127.0.0.1:4318."
    ),
]


def open_telemetry(service: str, url: str | None) -> Telemetry | None:
    """What traces, if it is asked for. Raises BadOption where it is not installed, or for what is no address."""
    if url is None:
        return None
    try:
        from bsns.node.telemetry import Telemetry
    except ModuleNotFoundError as missing:
        if not (missing.name or "").startswith("opentelemetry"):
            raise
        raise BadOption(
            f"--otlp needs {missing.name}, which is not installed: pip install 'bsns[telemetry]'"
        ) from missing
    return Telemetry.to(service, url)
