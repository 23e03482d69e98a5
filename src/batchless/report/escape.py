"""Texts from data, made literal: what a name holds is shown, never obeyed."""

import html
from collections.abc import Iterable, Sequence

_MARKDOWN = (
    ("\\", "\\\\"),
    ("&", "&amp;"),
    ("<", "&lt;"),
    ("|", "\\|"),
    ("`", "\\`"),
    ("*", "\\*"),
    ("[", "\\["),
)


def markdown_text(text: str) -> str:
    r"""Return `text` as one line of Markdown that shows it as it is, also within a table.

    >>> print(markdown_text("a|b <i> [x](y)"))
    a\|b &lt;i> \[x](y)
    """
    for character, written in _MARKDOWN:
        text = text.replace(character, written)
    return " ".join(text.split())


def markdown_table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table of texts that are shown as they are."""
    drawn = [map(markdown_text, head), ["---"] * len(head), *(map(markdown_text, line) for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in drawn)


def markdown_code(text: str) -> str:
    """Return `text` as a fenced block; the fence is longer than any run of backticks in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}\n{text}\n{fence}"


def chart_text(text: str) -> str:
    """Return `text` for a label in a chart: plotly reads tags and entities there, as a browser would.

    >>> chart_text('<a href="x">')
    '&lt;a href="x"&gt;'
    """
    return html.escape(" ".join(text.split()), quote=False)
