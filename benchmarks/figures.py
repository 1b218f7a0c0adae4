"""Pieces of SVG figures, and of pages that tables are put into."""

from __future__ import annotations

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A", "#882255", "#117733", "#AA4499")


def text(x: float, y: float, body: str, anchor: str = "middle", size: int = 11, **more: str) -> str:
    """One line of text."""
    style = "".join(f" {k.replace('_', '-')}='{v}'" for k, v in more.items())
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-size='{size}'{style}>{body}</text>"


def line(x1: float, y1: float, x2: float, y2: float, colour: str, opacity: float = 1.0) -> str:
    """One straight line."""
    at = f"x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}'"
    return f"<line {at} stroke='{colour}' opacity='{opacity}'/>"


def path(points: list[tuple[float, float]], colour: str) -> str:
    """A line through points."""
    at = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f"<polyline points='{at}' fill='none' stroke='{colour}' stroke-width='1.8'/>"


def page(width: int, height: int, body: str) -> str:
    """A whole figure; its grey text is readable on light and on dark."""
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' "
        f"font-family='system-ui, sans-serif' font-size='13' fill='#808890'>{body}</svg>\n"
    )


def between(page: str, key: str, body: str) -> str:
    """`page` with what stands between the marks of `key` replaced."""
    start, end = f"<!-- {key} -->", f"<!-- /{key} -->"
    before, _, rest = page.partition(start)
    return f"{before}{start}\n{body}\n{end}{rest.partition(end)[2]}"
