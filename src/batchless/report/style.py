"""How one series looks everywhere on a page: never told apart by colour alone."""

from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = 8  # --c0 to --c7 in page.css.j2
DASHES = (("solid", ""), ("dash", "7 4"), ("dot", "2 3"), ("dashdot", "9 3 2 3"), ("longdash", "14 4"))
MARKERS = (
    ("circle", "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z"),
    ("square", "M-4-4h8v8h-8z"),
    ("triangle-up", "M0-5.5L5 4h-10z"),
    ("diamond", "M0-5.8L5.2 0L0 5.8L-5.2 0z"),
    ("triangle-down", "M0 5.5L5-4h-10z"),
    ("cross", "M-1.6-5h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4z"),
    ("bowtie", "M-5.5-4.5V4.5L5.5-4.5V4.5z"),
)


@dataclass(frozen=True, kw_only=True)
class Style:
    """The look of a series.

    Attributes:
        index: of the series.
        colour: its number among the colours of the style sheet.
        dash: plotly's name of its line, and `dash_array` the same for SVG.
        dash_array: lengths in SVG units.
        symbol: plotly's name of its marker, and `path` the same for SVG.
        path: around the origin.
    """

    index: int
    colour: int
    dash: str
    dash_array: str
    symbol: str
    path: str


def style(index: int) -> Style:
    """Return the look of the series with this index."""
    dash, dash_array = DASHES[index % len(DASHES)]
    symbol, path = MARKERS[index % len(MARKERS)]
    return Style(index=index, colour=index % COLOURS, dash=dash, dash_array=dash_array, symbol=symbol, path=path)


def styles(names: Sequence[str], *, first: int = 0) -> dict[str, Style]:
    """Return one look per name, used in every chart and table of a page; `first` is the index of the first."""
    return {name: style(index) for index, name in enumerate(names, start=first)}
