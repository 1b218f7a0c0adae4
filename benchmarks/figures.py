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


def panel(
    title: str, below: str, lines: dict[str, list[tuple[float, float]]], x0: int, width: int = 460, height: int = 320,
    digits: int = 2,
) -> str:  # fmt: skip
    """Lines with their names at their ends, and axes with five ticks each, at `x0`."""
    left, top, right, bottom = 56, 40, 110, 48
    xs, ys = ([p[i] for points in lines.values() for p in points] for i in (0, 1))
    low, high = min(ys), max(ys)
    low, high = low - 0.03 * (high - low), high + 0.03 * (high - low)
    first, last = min(xs), max(xs)
    px = lambda x: x0 + left + (x - first) / (last - first) * (width - left - right)
    py = lambda y: top + (high - y) / (high - low) * (height - top - bottom)
    out = [text(x0 + 8, 20, title, "start", 13, font_weight="bold")]
    out.append(text(x0 + left + (width - left - right) / 2, height - 8, below, size=12))
    for i in range(5):
        x, y = first + (last - first) * i / 4, low + (high - low) * i / 4
        out.append(line(x0 + left, py(y), x0 + width - right, py(y), "#808080", 0.25))
        out.append(text(x0 + left - 6, py(y) + 4, f"{y:.{digits}f}", "end") + text(px(x), height - 28, f"{x:.3g}"))
    taken: list[float] = []
    colours = dict(zip(lines, COLOURS, strict=False))
    for name, points in sorted(lines.items(), key=lambda item: -item[1][-1][1]):
        y = py(points[-1][1]) + 4
        while any(abs(y - other) < 12 for other in taken):
            y += 1
        taken.append(y)
        out.append(path([(px(x), py(y)) for x, y in points], colours[name]))
        out.append(text(px(points[-1][0]) + 6, y, name, "start", fill=colours[name]))
    return "".join(out)
