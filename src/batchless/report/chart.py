"""Line charts as plain numbers: scales, ticks and pixels; `chart.svg.j2` turns them into SVG, escaping every text."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

COLOURS = 8  # --c0 to --c7 in page.html.j2
DASHES = ("", "7 4", "2 3", "9 3 2 3", "14 4")
MARKERS = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",  # circle
    "M-4-4h8v8h-8z",  # square
    "M0-5.5L5 4h-10z",  # triangle
    "M0-5.8L5.2 0L0 5.8L-5.2 0z",  # diamond
    "M0 5.5L5-4h-10z",  # triangle on its tip
    "M-1.6-5h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4z",  # plus
    "M-5.5-3h11v6h-11z",  # bar
)
CROSS = "M-4-4L4 4M-4 4L4-4"


@dataclass(frozen=True, kw_only=True)
class Style:
    """How one series looks everywhere on a page; never told apart by colour alone."""

    colour: int
    dash: str
    marker: str


@dataclass(frozen=True, kw_only=True)
class Point:
    """A value; `spread` is half the height of its error bar; without `title` it gets no marker."""

    x: float
    y: float
    spread: float = 0.0
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A series: its points joined in order; `absent` are x positions without a value, marked at the foot of the plot."""

    style: Style
    points: tuple[Point, ...]
    absent: tuple[Point, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What an axis says and where it goes; ticks with an empty text have a line only."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    scale: Callable[[float], float] = float


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A marker in pixels: `low` and `high` end its error bar."""

    x: float
    y: float
    low: float
    high: float
    title: str


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A series in pixels."""

    style: Style
    path: str
    marks: tuple[Mark, ...]
    absent: tuple[Mark, ...]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart in pixels, ready for the template."""

    label: str
    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    x_label: str
    y_label: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[Drawn, ...]


def style(index: int) -> Style:
    """Return the look of the series with this index."""
    return Style(colour=index % COLOURS, dash=DASHES[index % len(DASHES)], marker=MARKERS[index % len(MARKERS)])


def ticks(low: float, high: float, *, count: int = 5) -> tuple[float, ...]:
    """Return about `count` round numbers that enclose `low` to `high`."""
    rough = max(high - low, 1e-9 * max(abs(high), 1.0)) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return tuple(round(index * step, 10) for index in range(first, max(last, first + 1) + 1))


def draw(
    lines: Sequence[Line], *, label: str, x: Axis, y: Axis, width: int, height: int, text: int, dodge: float = 0.0
) -> Chart:
    """Lay out `lines` in a box of `width` by `height`.

    Args:
        lines: the series.
        label: what the chart shows, for those who do not see it.
        x: the horizontal axis.
        y: the vertical axis; values beyond it are drawn on its edge.
        width: of the box, in SVG units.
        height: of the box, in SVG units.
        text: the largest size the style sheet gives the texts, in SVG units; the margins follow from it.
        dodge: how far apart the series are drawn where they have the same x, so that error bars do not overlap.
    """
    left, right = round(8 + 1.9 * text), width - text // 2
    top, bottom = round(1.7 * text), height - round(2.6 * text)
    inset = (right - left) / 24  # markers at either end stay clear of the axis
    crossed = [line for line in lines if line.absent]

    def across(value: float, shift: float = 0.0) -> float:
        low, high = x.scale(x.low), x.scale(x.high)
        share = 0.5 if high == low else (x.scale(value) - low) / (high - low)
        return round(left + inset + share * (right - left - 2 * inset) + shift, 1)

    def up(value: float) -> float:
        share = (value - y.low) / (y.high - y.low)
        return round(bottom - min(max(share, 0.0), 1.0) * (bottom - top), 1)

    def drawn(index: int, line: Line) -> Drawn:
        shift = dodge * (index - (len(lines) - 1) / 2)
        at = [(across(point.x, shift), up(point.y)) for point in line.points]
        marks = tuple(
            Mark(x=px, y=py, low=up(point.y - point.spread), high=up(point.y + point.spread), title=point.title)
            for point, (px, py) in zip(line.points, at, strict=True)
            if point.title
        )
        foot = 10 * (crossed.index(line) - (len(crossed) - 1) / 2) if line.absent else 0.0
        absent = tuple(
            Mark(x=across(point.x, foot), y=bottom - 8, low=bottom - 8, high=bottom - 8, title=point.title)
            for point in line.absent
        )
        path = "M" + "L".join(f"{px:g} {py:g}" for px, py in at) if at else ""
        return Drawn(style=line.style, path=path, marks=marks, absent=absent)

    return Chart(
        label=label,
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        x_label=x.label,
        y_label=y.label,
        x_ticks=tuple((across(value), said) for value, said in x.ticks),
        y_ticks=tuple((up(value), said) for value, said in y.ticks),
        lines=tuple(drawn(index, line) for index, line in enumerate(lines)),
    )
