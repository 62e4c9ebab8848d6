"""Table (Markdown) and plots of a run."""

from __future__ import annotations

import statistics
from pathlib import Path
from xml.sax.saxutils import escape

from peers import NAMES
from rows import PARTS, ROWS, SHARES, Goal, Row

Rounds = list[dict[str, dict[str, float]]]
OURS = "isagellm"


def values(rounds: Rounds, name: str, row: str) -> list[float]:
    """A contender's numbers, of the rounds that have one."""
    return [r[name][row] for r in rounds if row in r.get(name, {})]


def ratios(rounds: Rounds, row: str, peer: str = "") -> list[float]:
    """Ours against a peer, or against the best of each round; above 1 is ahead."""
    out = []
    for r in rounds:
        peers = [v[row] for name, v in r.items() if row in v and (name == peer if peer else name != OURS)]
        if row in r.get(OURS, {}) and peers:
            ours = r[OURS][row]
            out.append(ours / max(peers) if ROWS[row].more else min(peers) / ours)
    return out


def shares(rounds: Rounds, row: str) -> list[float]:
    """Ours as a share of the row's physical limit, round by round."""
    limit = SHARES[row][0] if row in SHARES else ""
    return [r[OURS][row] / r[OURS][limit] for r in rounds if row in r.get(OURS, {}) and limit in r.get(OURS, {})]


def table(report: dict) -> str:
    """Return everything as Markdown: a table for each part, with the goal of each row and whether it is met."""
    lines = [f"{report['machine']}, {report['threads']} threads, {report['date']}"]
    for key, part in report["parts"].items():
        lines += ["", *(kl_table(part) if "paths" in part else _part(key, part))]
    return "\n".join(lines) + "\n"


def _part(key: str, part: dict) -> list[str]:
    rounds: Rounds = part["rounds"]
    names = sorted({name for r in rounds for name in r}, key=[*NAMES].index)
    heads = " | ".join(NAMES[name] for name in names)
    lines = [
        f"**{part['title']}**, medians of {len(rounds)} interleaved rounds",
        "",
        f"| work | unit | {heads} | ahead of the best (spread) | goal | met |",
        "|---|---|" + "---|" * (len(names) + 3),
    ]
    for row, what in ROWS.items():
        if not values(rounds, OURS, row):
            continue
        cells = [_number(values(rounds, name, row)) for name in names]
        ahead = ratios(rounds, row)
        spread = f"{statistics.median(ahead):.2f}× ({min(ahead):.2f}–{max(ahead):.2f})" if ahead else "–"
        goals, met = _goals(key, row, rounds, share=False)
        lines.append(f"| {what.title} | {what.unit} | {' | '.join(cells)} | {spread} | {goals} | {met} |")
        if of_limit := shares(rounds, row):
            goals, met = _goals(key, row, rounds, share=True)
            cells = [f"{statistics.median(of_limit):.0%}", *("–" for _ in names[1:])]
            lines.append(f"| {SHARES[row][1]} | | {' | '.join(cells)} | – | {goals} | {met} |")
    lines += [f"\n{NAMES[name]} is left out: {reason}" for name, reason in part["left_out"].items()]
    return lines


def _goals(key: str, row: str, rounds: Rounds, *, share: bool) -> tuple[str, str]:
    goals = [goal for goal in PARTS[key].goals.get(row, ()) if bool(goal.share) == share]
    if not goals:
        return "–", "–"
    verdicts = [_verdict(goal, row, rounds) for goal in goals]
    return "; ".join(_words(goal, ROWS[row]) for goal in goals), "; ".join(verdicts)


def _words(goal: Goal, row: Row) -> str:
    if goal.share:
        return f"≥ {goal.share:.0%}"
    if goal.at_most:
        return f"≤ {goal.at_most:g} {row.unit}"
    return f"≥ {goal.ahead:g}× {NAMES[goal.peer].partition(' (')[0] if goal.peer else 'the best'}"


def _verdict(goal: Goal, row: str, rounds: Rounds) -> str:
    if goal.share:
        seen, needed = statistics.median(shares(rounds, row)), goal.share
    elif goal.at_most:
        return "yes" if statistics.median(values(rounds, OURS, row)) <= goal.at_most else "no"
    else:
        found = ratios(rounds, row, goal.peer)
        if not found:
            return "not measured"
        seen, needed = statistics.median(found), goal.ahead
    return "yes" if seen >= needed else f"no ({seen:.0%})" if goal.share else f"no ({seen:.2f}×)"


def _number(numbers: list[float]) -> str:
    if not numbers:
        return "–"
    value = statistics.median(numbers)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def kl_table(part: dict) -> list[str]:
    """Return the lines of what `quality.compare` found; each of our paths should be no worse than llama.cpp."""
    lines = [f"**{part['title']}**", "", "| path | KL | KL p99 | top-1 | goal | met |", "|---|---|---|---|---|---|"]
    peers = [path["kl"] for path in part["paths"] if not path["name"].startswith(OURS)]
    for path in part["paths"]:
        goal = bool(peers) and path["name"].startswith(OURS)
        met = "yes" if goal and path["kl"] <= min(peers) else "no"
        verdict = f"≤ llama.cpp's | {met}" if goal else "– | –"
        lines.append(f"| {path['name']} | {path['kl']:.5f} | {path['kl_p99']:.4f} | {path['top1']:.1%} | {verdict} |")
    return lines


def write_plot(report: dict, part: dict, path: Path) -> None:
    """Draw each row's ratio to the best peer as a bar, 1 marked, into an SVG file."""
    found = {row: ratios(part["rounds"], row) for row in ROWS}
    bars = [(ROWS[row].title, statistics.median(r)) for row, r in found.items() if r]
    if not bars:
        return
    top = max(2.0, *(value for _, value in bars))
    scale, left, height = 360 / top, 380, 26
    head = f"{part['title']}: times faster (or smaller) than the best peer, {report['date']}, {report['machine']}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + 440}" height="{height * len(bars) + 50}" font-family="sans-serif" font-size="13">',
        f'<text x="8" y="18">{escape(head)}</text>',
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
