"""A run as one SVG: TTFT of each request over time, and the distributions of TTFT, TPOT and E2E. No plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

from sagellm.bench.report import percentile
from sagellm.bench.runner import Record

__all__ = ["plot"]

_W, _H, _PAD = 460, 260, 48
_COLOURS = {"TTFT": "#2563eb", "TPOT": "#16a34a", "E2E": "#d97706"}


def plot(run: dict[str, Any], records: Sequence[Record]) -> str:
    """Return the SVG document."""
    good = [r for r in records if r.ok]
    parts = [_scatter([(r.sent_s, r.ttft_s * 1000) for r in good], 0)]
    curves = {
        "TTFT": [r.ttft_s * 1000 for r in good],
        "TPOT": [r.tpot_s * 1000 for r in good if r.output_tokens > 1],
        "E2E": [r.e2e_s * 1000 for r in good],
    }
    parts += [_distribution(name, values, k + 1) for k, (name, values) in enumerate(curves.items())]
    title = escape(f"{run.get('kind', '')} · {run.get('model', '')} · {run.get('workload', '')}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * _W} {2 * _H + 40}" font-family="system-ui, sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n<text x="16" y="26" font-size="16" font-weight="bold">{title}</text>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _frame(
    slot: int, title: str, x_label: str, y_label: str, x_max: float, y_max: float
) -> tuple[float, float, list[str]]:
    left, top = (slot % 2) * _W + _PAD, (slot // 2) * _H + 64
    width, height = _W - 2 * _PAD, _H - 84
    out = [
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#9ca3af"/>',
        f'<text x="{left}" y="{top - 8}" font-weight="bold">{escape(title)}</text>',
        f'<text x="{left + width}" y="{top + height + 30}" text-anchor="end" fill="#4b5563">{escape(x_label)}</text>',
        f'<text x="{left + width}" y="{top - 8}" text-anchor="end" fill="#4b5563">{escape(y_label)}</text>',
    ]
    for k in range(5):
        x, y = left + width * k / 4, top + height * (1 - k / 4)
        out.append(f'<text x="{x:.1f}" y="{top + height + 15}" text-anchor="middle">{x_max * k / 4:.3g}</text>')
        out.append(f'<text x="{left - 4}" y="{y + 4:.1f}" text-anchor="end">{y_max * k / 4:.3g}</text>')
    return left, top, out


def _scatter(points: Sequence[tuple[float, float]], slot: int) -> str:
    x_max = max((x for x, _ in points), default=1.0) or 1.0
    y_max = max((y for _, y in points), default=1.0) or 1.0
    left, top, out = _frame(slot, "TTFT of each request", "seconds", "ms", x_max, y_max)
    width, height = _W - 2 * _PAD, _H - 84
    out += [
        f'<circle cx="{left + width * x / x_max:.1f}" cy="{top + height * (1 - y / y_max):.1f}" r="2" fill="#2563eb" fill-opacity="0.6"/>'
        for x, y in points
    ]
    return "\n".join(out)


def _distribution(name: str, values: Sequence[float], slot: int) -> str:
    """Draw the cumulative distribution."""
    x_max = max(values, default=1.0) or 1.0
    left, top, out = _frame(slot, f"{name}: share of requests below", "ms", "%", x_max, 100)
    width, height = _W - 2 * _PAD, _H - 84
    if values:
        points = [(percentile(values, q), q) for q in range(101)]
        path = " ".join(f"{left + width * x / x_max:.1f},{top + height * (1 - q / 100):.1f}" for x, q in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{_COLOURS[name]}" stroke-width="2"/>')
    return "\n".join(out)
