"""Tables of nodes, plans and links, as every verb prints them."""

from __future__ import annotations

from collections.abc import Collection

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from bsns.cli.console import out

LEAST_WIDTH = 80
"""What every table is made for; on a narrower terminal its lines go on below rather than lose letters."""
WIDE = 10_000
"""Characters; wider than any terminal."""


def table(*columns: str, title: Text | str | None = None, broken: Collection[str] = ()) -> Table:
    """Without frames and margins. Only the columns named as `broken` take more than one line where it is narrow: half
    an id, or half a figure, is of use to nobody."""
    view = Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for column in columns:
        view.add_column(column, no_wrap=column not in broken, overflow="fold" if column in broken else "ellipsis")
    return view


def print_table(view: Table) -> None:
    """As wide as the terminal; elsewhere each row is a line, for other programs to search."""
    most = max(out.width, LEAST_WIDTH) if out.is_terminal else WIDE
    wanted = min(natural_width(view), most)
    if wanted > out.width:
        view.width = wanted
    out.print(view)


def natural_width(view: Table) -> int:
    """The characters it takes where nothing is broken."""
    return out.measure(view, options=out.options.update(width=WIDE)).maximum
