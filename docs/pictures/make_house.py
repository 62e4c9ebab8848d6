"""Draw house.svg: the floors of isagellm and the walk of one request. Run: python docs/pictures/make_house.py."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

WIDTH, FLOOR, LEFT, TOP = 960, 84, 24, 56
FLOORS = [
    ("sagellm", "umbrella", "client · command line · compose · model store", "#dbeafe"),
    ("sagellm_gateway", "HTTP", "OpenAI · Anthropic · Ollama dialects, streaming, limits, keys", "#dcfce7"),
    (
        "sagellm_control_plane",
        "many engines",
        "admission · policies · routing · lifecycle · recovery of streams",
        "#fef9c3",
    ),
    ("sagellm_core", "one engine", "scheduler · paged KV cache · loaders · tokenizer · templates", "#ffedd5"),
    ("sagellm_backend", "a device", "native CPU (C++) · numpy reference · mock", "#fee2e2"),
    ("sagellm_protocol", "the words", "types · errors · ports · wire codec", "#ede9fe"),
]
STEPS = [
    "1  POST /v1/chat/completions",
    "2  dialect decodes, limits and key checked",
    "3  template, token ids, admission, engine chosen",
    "4  wire to the engine process, batch, KV blocks",
    "5  one native call a step, token ids out",
    "6  ids travel back, become text, leave as events",
]


def text(x: float, y: float, words: str, size: int = 14, weight: str = "normal", fill: str = "#111827") -> str:
    """Return one line of text."""
    return f'<text x="{x}" y="{y}" font-size="{size}" font-weight="{weight}" fill="{fill}">{escape(words)}</text>'


def main() -> None:
    """Write house.svg beside this file."""
    height = TOP + FLOOR * len(FLOORS) + 40
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif" role="img" '
        'aria-label="The six packages of isagellm and the walk of one request through them">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#374151"/></marker></defs>',
        text(LEFT, 32, "The house: a package uses only the floors below it", 18, "bold"),
        text(600, 32, "The walk of one request", 18, "bold"),
    ]
    for i, (name, role, parts, colour) in enumerate(FLOORS):
        y = TOP + i * FLOOR
        out += [
            f'<rect x="{LEFT}" y="{y}" width="540" height="{FLOOR - 10}" rx="8" fill="{colour}" stroke="#9ca3af"/>',
            text(LEFT + 16, y + 30, name, 16, "bold"),
            text(LEFT + 240, y + 30, role, 14, "normal", "#4b5563"),
            text(LEFT + 16, y + 54, parts, 13, "normal", "#1f2937"),
            text(624, y + 42, STEPS[i], 14),
        ]
    low, high = TOP + 20, TOP + FLOOR * len(FLOORS) - 24
    out += [
        f'<path d="M588,{low} L588,{high}" stroke="#374151" stroke-width="2" fill="none" marker-end="url(#tip)"/>',
        f'<path d="M606,{high} L606,{low}" stroke="#374151" stroke-width="2" fill="none" marker-end="url(#tip)"/>',
        text(
            LEFT,
            height - 12,
            "gateway + control plane: one process     each engine: a process of its own",
            13,
            "normal",
            "#4b5563",
        ),
        "</svg>",
    ]
    Path(__file__).with_name("house.svg").write_text("\n".join(out) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
