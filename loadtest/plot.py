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


LINES_HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 50, 600, 44, 280
LABEL_GAP = 16  # between two names at the lines' ends
LINES_STYLE = f"""
text{{font:13px sans-serif;fill:{INK}}}.t{{font-weight:bold}}.n{{font-size:11px}}
.ours{{stroke:{OURS};stroke-width:3;fill:none}}.theirs{{stroke:{THEIRS};stroke-width:2;fill:none}}.axis{{stroke:{THEIRS};stroke-width:.5}}
@media(prefers-color-scheme:dark){{text{{fill:#e4e7eb}}.ours{{stroke:#3ebd93}}}}
"""

Series = dict[str, list[tuple[float, float]]]


def lines(title: str, note: str, series: Series, ours: str = "streamd", *, x_step: int = 4000, y_step: int = 1) -> str:
    """Lines over a common x, each named at its end; `ours` stands out. Readable on a light and on a dark page."""
    points = [point for line in series.values() for point in line]
    x_most, y_most = max(x for x, _ in points), max(y for _, y in points)
    x_scale, y_scale = (RIGHT - LEFT) / x_most, (BOTTOM - TOP) / y_most
    parts = [f'<text class="t" x="10" y="22">{escape(title)}</text>']
    parts += [f'<text class="n" x="10" y="{LINES_HEIGHT - 12}">{escape(note)}</text>']
    for x in range(0, int(x_most) + 1, x_step):
        parts += [f'<text x="{LEFT + x * x_scale:.0f}" y="{BOTTOM + 20}" text-anchor="middle">{x:,}</text>']
    for y in range(0, int(y_most) + 1, y_step):
        at = BOTTOM - y * y_scale
        parts += [f'<path class="axis" d="M{LEFT} {at:.0f}H{RIGHT}"/><text x="{LEFT - 24}" y="{at + 4:.0f}">{y}</text>']
    label_y = LINES_HEIGHT + 0.0
    for name, line in sorted(series.items(), key=lambda named: named[1][-1][1]):
        way = "L".join(f"{LEFT + x * x_scale:.1f} {BOTTOM - y * y_scale:.1f}" for x, y in line)
        label_y = min(BOTTOM - line[-1][1] * y_scale + 4, label_y - LABEL_GAP)
        parts += [f'<path class="{"ours" if name == ours else "theirs"}" d="M{way}"/>']
        parts += [f'<text x="{RIGHT + 8}" y="{label_y:.0f}">{escape(name)} {line[-1][1]:.2g}</text>']
    size = f'width="{WIDTH}" height="{LINES_HEIGHT}" viewBox="0 0 {WIDTH} {LINES_HEIGHT}"'
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{LINES_STYLE}</style>", *parts, "</svg>", ""]
    )
