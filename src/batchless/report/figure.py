"""What the charts of a page have in common, as the JSON that plotly draws.

A colour such as `--c0` is one of the style sheet's variables. Beside `data` and `layout` a figure may hold `across`: what
the horizontal axis may count, by name, `{"x": one list per trace, "xaxis": settings}`; buttons of the page choose from it.
"""

from textwrap import wrap
from typing import Any

from batchless.report.escape import chart_text
from batchless.report.style import Style

Figure = dict[str, Any]
"""`data` and `layout`, see https://plotly.com/javascript/reference."""

_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", "Liberation Sans", sans-serif'
_LEAST_SPAN = 10.0  # percentage points: fewer on the whole axis would make a drama of noise


def line_trace(look: Style, name: str) -> dict[str, Any]:
    """Return what every line of the series has."""
    return {
        "type": "scatter",
        "name": chart_text(name),
        "meta": look.index,  # the legend of the page shows and hides series by this
        "line": {"color": f"--c{look.colour}", "dash": look.dash, "width": 2},
    }


def folded(text: str, *, width: int = 40, lines: int = 6) -> str:
    """Return `text` escaped and in lines that fit a phone; a label as long as an error message is cut."""
    folded = wrap(text, width, max_lines=lines, placeholder=" ...") or [""]
    return "<br>".join(chart_text(line) for line in folded)


def percent_range(low: float, high: float) -> tuple[float, float]:
    """Return the ends of an axis of percentages that shows values from `low` to `high`."""
    margin = max(_LEAST_SPAN - (high - low), 0.16 * (high - low)) / 2
    return max(low - margin, -2.0), min(high + margin, 102.0)


def base_layout(title: str, *, height: int) -> dict[str, Any]:
    """Return the layout of every chart: its title names the vertical axis."""
    axis = {
        "gridcolor": "--grid",
        "linecolor": "--soft",
        "zeroline": False,
        "tickfont": {"color": "--soft", "size": 12},
        "automargin": True,
    }
    return {
        "height": height,
        "margin": {"l": 34, "r": 10, "t": 30, "b": 44},
        "title": {
            "text": title,
            "font": {"color": "--soft", "size": 13},
            "x": 0,
            "xref": "container",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"t": 6},
        },
        "font": {"family": _FONT, "color": "--ink"},
        "paper_bgcolor": "--page",
        "plot_bgcolor": "--page",
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": "--panel",
            "bordercolor": "--soft",
            "font": {"color": "--ink", "size": 13},
            "align": "left",
        },
        "showlegend": False,
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "--soft", "activecolor": "--ink"},
        "uirevision": "same",  # a zoom survives when series are hidden or the colours change
        "xaxis": axis | {"showgrid": False, "ticks": "outside", "tickcolor": "--soft", "showline": True},
        "yaxis": axis,
    }
