"""The dashboard's page: its files, which come with the package, and the headers that confine it to this gateway."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",  # text becomes markup nowhere
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


@dataclass(frozen=True, slots=True)
class PageFile:
    content: bytes
    media_type: str


def page_files() -> dict[str, PageFile]:
    """By the path that a browser asks for."""
    files = {}
    for file in (resources.files("bsns.gateway") / "site").iterdir():
        kind = TYPES[file.name.rpartition(".")[2]]
        path = "/" if file.name == "index.html" else f"/dashboard/{file.name}"
        files[path] = PageFile(file.read_bytes(), kind)
    return files
