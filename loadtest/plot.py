"""Bar charts as SVG, written by hand: no dependency, and a diff of two results can be read."""

from __future__ import annotations

from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, LABEL_WIDTH, BAR_WIDTH, ROW_HEIGHT, TITLE_HEIGHT = 720, 110, 500, 26, 40
OURS, THEIRS, INK = "#0b6e4f", "#9aa5b1", "#1f2933"


@dataclass(frozen=True)
class Chart:
    """A group of horizontal bars; less is better."""

    title: str
    values: dict[str, float]

    @property
    def height(self) -> int:
        """The height in pixels."""
        return TITLE_HEIGHT + ROW_HEIGHT * len(self.values)


def svg(charts: list[Chart], ours: str = "streamd") -> str:
    """All charts, from top to bottom; the bars of `ours` stand out."""
    parts, top = [], 10
    for chart in charts:
        parts += _chart(chart, top, ours)
        top += chart.height + 10
    style = f"text{{font:13px sans-serif;fill:{INK}}}.t{{font-weight:bold}}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}">'
    ground = f'<rect width="{WIDTH}" height="{top}" fill="#ffffff"/>'
    return "\n".join([head, f"<style>{style}</style>", ground, *parts, "</svg>", ""])


def _chart(chart: Chart, top: int, ours: str) -> list[str]:
    lines = [f'<text class="t" x="10" y="{top + 20}">{escape(chart.title)}</text>']
    most = max(chart.values.values(), default=0) or 1
    for row, (name, value) in enumerate(chart.values.items()):
        y = top + TITLE_HEIGHT - 8 + row * ROW_HEIGHT
        width = max(1.0, value / most * BAR_WIDTH)
        colour = OURS if name == ours else THEIRS
        lines += [
            f'<text x="{LABEL_WIDTH - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{LABEL_WIDTH}" y="{y}" width="{width:.1f}" height="{ROW_HEIGHT - 6}" fill="{colour}"/>',
            f'<text x="{LABEL_WIDTH + width + 6:.1f}" y="{y + 15}">{value:.3g}</text>',
        ]
    return lines
