"""Charts: Vega-Lite specifications, drawn as SVG by Vega itself in an embedded engine; no browser, no file and no network.

Colours are CSS variables of the page (`var(--c1)`), so that one drawing serves light and dark. Each chart is drawn at two widths,
because letters that shrink with a picture cannot be read on a telephone; the page shows the one that fits.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import vl_convert

WIDTHS = {"wide": 548, "narrow": 334}
"""Pixels, with axes and legend."""

HUES = [f"var(--c{n})" for n in range(1, 7)]
STEPS = [f"var(--s{n})" for n in range(1, 6)]
"""Five steps of one hue, from little to much; `var(--t1)` to `var(--t5)` are letters that can be read on them."""

FONT = "Helvetica Neue, Helvetica, Arial, Liberation Sans, sans-serif"

THEME: dict[str, Any] = {
    "background": None,
    "font": FONT,
    "view": {"stroke": None},
    # a reader's font may be wider than the one that labels are measured in here: room to the left of the longest
    "padding": {"left": 16, "right": 5, "top": 5, "bottom": 5},
    "axis": {
        "labelColor": "var(--soft)",
        "titleColor": "var(--soft)",
        "gridColor": "var(--line)",
        "domainColor": "var(--edge)",
        "tickColor": "var(--edge)",
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "labelOverlap": True,
        "labelSeparation": 8,
        "labelLimit": 130,
    },
    "axisX": {"labelAngle": 0, "grid": False},
    "legend": {
        "orient": "top",
        "title": None,
        "labelColor": "var(--ink)",
        "labelFontSize": 12,
        "symbolStrokeWidth": 0,
        "labelLimit": 200,
    },
    "range": {"category": HUES, "ordinal": STEPS, "ramp": STEPS, "heatmap": STEPS},
    "bar": {"color": HUES[0]},
    "line": {"color": HUES[0], "strokeWidth": 2},
    "point": {"color": HUES[0], "filled": True, "size": 40},
    "rule": {"color": "var(--edge)"},
    "text": {"color": "var(--ink)", "fontSize": 12},
}


def draw(chart: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], title: str, says: str) -> dict[str, str]:
    """Draw rows at each width: {"wide": svg, "narrow": svg}.

    chart: a Vega-Lite specification without data, size and theme (`height` may be given). rows: JSON values. title, says: what a
    screen reader says of the picture.
    """
    return {name: _drawn(chart, rows, width, title, says) for name, width in WIDTHS.items()}


def _drawn(chart: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], width: int, title: str, says: str) -> str:
    whole = {
        "height": 240,
        **chart,
        "width": width,
        "autosize": {"type": "fit", "contains": "padding"},
        "data": {"values": list(rows)},
        "config": THEME,
    }
    svg: str = vl_convert.vegalite_to_svg(whole, allowed_base_urls=[])
    # a picture with a name and a description is one thing to a screen reader; its figures stand in the table beside it
    head, _, rest = svg.partition(">")
    named = f'{head} role="img"><title>{html.escape(title)}</title><desc>{html.escape(says)}</desc>'
    return named + rest
