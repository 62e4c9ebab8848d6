"""Table and plot of a benchmark's rounds."""

from __future__ import annotations

import statistics
from pathlib import Path
from xml.sax.saxutils import escape

Rounds = list[dict[str, dict[str, float]]]


def medians(rounds: Rounds, row: str) -> dict[str, float]:
    """Contender -> median of `row`, for those that have it."""
    names = rounds[0].keys()
    values = {name: [r[name][row] for r in rounds if row in r[name]] for name in names}
    return {name: statistics.median(v) for name, v in values.items() if v}


def ratios(rounds: Rounds, row: str, better: bool) -> list[float]:
    """Ours against the best peer, round by round; above 1 is ahead."""
    out = []
    for r in rounds:
        peers = [values[row] for name, values in r.items() if name != "isagellm" and row in values]
        if row in r["isagellm"] and peers:
            ours = r["isagellm"][row]
            out.append(ours / max(peers) if better else min(peers) / ours)
    return out


def print_table(result: dict, rows: dict, titles: dict[str, str]) -> None:
    """Print a Markdown table: medians, the median ratio and its spread."""
    rounds: Rounds = result["rounds"]
    names = list(rounds[0])
    names.sort(key=lambda n: n != "isagellm")
    print(f"\n{result['machine']}, {result['threads']} threads, {len(rounds)} rounds, {result['date']}\n")
    print("| work | unit | " + " | ".join(names) + " | ahead of the best peer (spread) |")
    print("|---|---|" + "---|" * (len(names) + 1))
    for row, (_, unit, better) in rows.items():
        values = medians(rounds, row)
        if "isagellm" not in values:
            continue
        ratio = ratios(rounds, row, better)
        ahead = f"{statistics.median(ratio):.2f}× ({min(ratio):.2f}–{max(ratio):.2f})" if ratio else "–"
        cells = [f"{values[n]:.3g}" if n in values else "–" for n in names]
        cells = [
            f"{values[n]:,.0f}" if n in values and values[n] >= 100 else c for n, c in zip(names, cells, strict=True)
        ]
        print(f"| {titles[row]} | {unit} | " + " | ".join(cells) + f" | {ahead} |")
    print()
    for row, limit in (("decode", "decode_limit"), ("prefill512", "prefill_limit"), ("prefill2048", "prefill_limit")):
        share = [
            r["isagellm"][row] / r["isagellm"][limit] for r in rounds if row in r["isagellm"] and limit in r["isagellm"]
        ]
        if share:
            what = "the read bandwidth" if row == "decode" else "the int8 dot peak"
            print(f"{titles[row]}: {statistics.median(share):.0%} of what {what} measured in the same rounds allows")


def write_plot(result: dict, rows: dict, titles: dict[str, str], path: Path) -> None:
    """Draw each row's ratio to the best peer as a bar (log-free, 1 marked) into an SVG file."""
    rounds: Rounds = result["rounds"]
    bars = [
        (titles[row], statistics.median(r))
        for row, (_, _, better) in rows.items()
        if (r := ratios(rounds, row, better))
    ]
    if not bars:
        return
    top = max(2.0, *(value for _, value in bars))
    scale, left, height = 360 / top, 230, 26
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + 440}" height="{height * len(bars) + 50}" font-family="sans-serif" font-size="13">',
        f'<text x="8" y="18">times faster (or smaller) than the best peer, {escape(result["date"])}, {escape(result["machine"])}</text>',
    ]
    for i, (title, value) in enumerate(bars):
        y = 32 + i * height
        colour = "#2a7de1" if value >= 1 else "#d9822b"
        parts += [
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(title)}</text>',
            f'<rect x="{left}" y="{y}" width="{value * scale:.1f}" height="{height - 7}" fill="{colour}"/>',
            f'<text x="{left + value * scale + 6:.1f}" y="{y + 15}">{value:.2f}×</text>',
        ]
    x = left + scale
    parts += [
        f'<line x1="{x:.1f}" y1="26" x2="{x:.1f}" y2="{32 + height * len(bars)}" stroke="#888" stroke-dasharray="3"/>',
        "</svg>",
    ]
    path.write_text("\n".join(parts))
