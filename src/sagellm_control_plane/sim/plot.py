"""A line chart as SVG text, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sagellm_control_plane.sim.report import Row

__all__ = ["goodput_svg"]

_COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8d5a97", "#e08e0b", "#4a4a4a", "#17a2b8", "#9c6644")
_LEFT, _TOP, _WIDTH, _HEIGHT = 60, 20, 520, 300


def goodput_svg(rows: Sequence[Row]) -> str:
    """Return goodput (share of all arrivals within the objectives) over the speed-up, one line for each policy."""
    speeds = sorted({row.speed_up for row in rows})
    low, high = speeds[0], max(speeds[-1], speeds[0] + 1e-9)

    def x(speed: float) -> float:
        return _LEFT + (speed - low) / (high - low) * _WIDTH

    def y(goodput: float) -> float:
        return _TOP + (1.0 - goodput) * _HEIGHT

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 190} {_TOP + _HEIGHT + 50}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="14" y="{_TOP + _HEIGHT / 2:.0f}" text-anchor="middle" '
        f'transform="rotate(-90 14 {_TOP + _HEIGHT / 2:.0f})">goodput (share of all arrivals)</text>',
    ]
    parts.extend(
        f'<line x1="{_LEFT}" y1="{y(tenth / 10):.1f}" x2="{_LEFT + _WIDTH}" y2="{y(tenth / 10):.1f}" stroke="#ddd"/>'
        f'<text x="{_LEFT - 8}" y="{y(tenth / 10) + 4:.1f}" text-anchor="end">{tenth / 10:.1f}</text>'
        for tenth in range(0, 11, 2)
    )
    parts.extend(
        f'<text x="{x(speed):.1f}" y="{_TOP + _HEIGHT + 18}" text-anchor="middle">{speed:g}x</text>' for speed in speeds
    )
    middle = _LEFT + _WIDTH / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{_TOP + _HEIGHT + 38}" text-anchor="middle">load (speed-up of the trace)</text>'
    )
    for number, policy in enumerate(dict.fromkeys(row.policy for row in rows)):
        colour = _COLOURS[number % len(_COLOURS)]
        points = sorted((row.speed_up, row.goodput) for row in rows if row.policy == policy)
        path = " ".join(f"{x(speed):.1f},{y(goodput):.1f}" for speed, goodput in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.extend(
            f'<circle cx="{x(speed):.1f}" cy="{y(goodput):.1f}" r="3" fill="{colour}"/>' for speed, goodput in points
        )
        at = _TOP + 14 + 18 * number
        parts.append(
            f'<rect x="{_LEFT + _WIDTH + 16}" y="{at - 9}" width="12" height="4" fill="{colour}"/>'
            f'<text x="{_LEFT + _WIDTH + 34}" y="{at}">{escape(policy)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])
