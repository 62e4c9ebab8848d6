"""Record the token ids that llama.cpp gives for a fixed set of texts: the oracle of test_recorded_tokens.py.

Usage, with a llama.cpp server that has loaded the model::

    python tests/tools/record_tokens.py http://127.0.0.1:8080 smollm2-135m tests/sagellm_core/text/data/tokens-smollm2.json
"""

from __future__ import annotations

import json
import random
import sys
import urllib.request
from pathlib import Path

TEXTS = [
    "Hello world", " Hello  world", "Hello\n\n\nworld\n", "\t\ttabs and   spaces   ", "don't can't I'll we've they're I'd",
    "DON'T SHOUT", "1234567890 3.14159 1,000,000 12:34", "x=1;y=2;z=x+y", "def f(x):\n    return x ** 2\n\n\nprint(f(3))",
    "<|im_start|>user\nhi<|im_end|>", "<start_of_turn>user<end_of_turn><bos><eos><s>", "ünïcödé ÄÖÜ ßß ñandú façade",
    "Привет, как дела? Ёжик.", "你好，世界！这是一个测试。", "こんにちは世界、カタカナとひらがな", "안녕하세요 세계", "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया",
    "สวัสดีชาวโลก", "🙂 😀👩‍👩‍👧‍👦 🇩🇪 👍🏽", "e\u0301 cafe\u0301 A\u030a", "\u00a0non\u00a0breaking\u2009thin\u3000wide", "zero\u200bwidth\ufeffbom",
    "https://example.org/a?b=c&d=%20#frag", "C:\\path\\to\\file.txt", '{"a": [1, 2.5, null, true], "b": "\\u00e9"}',
    "<html><body class=\"x\">&nbsp;</body></html>", "a" * 70, "ab" * 40, "-" * 50, "=" * 17 + "\n" + "#" * 9, ".....!!!???", "Ⅷ ² ½ ٣ ৩ 𝟘𝟙",
    "\u2581underscore\u2581\u2581", "mixed日本語English한국어", "\r\nwindows\r\nlines\r\n", "trailing space ", " ", "\n", "  \n  \n  ", "𝕳𝖊𝖑𝖑𝖔 𐍈 𒀀", "don’t “quote” — dash…",
]  # fmt: skip


def random_texts(count: int) -> list[str]:
    """Return texts of random characters from several scripts."""
    rng = random.Random(20)
    ranges = [(0x20, 0x7F), (0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x5D0, 0x650), (0x900, 0x980), (0x3040, 0x30FF),
              (0x4E00, 0x5000), (0xAC00, 0xAD00), (0x1F300, 0x1F650), (0x2000, 0x2070)]  # fmt: skip
    out = []
    for _ in range(count):
        low, high = rng.choice(ranges)
        chars = [chr(rng.randrange(low, high)) if rng.random() < 0.8 else rng.choice(" \n\t  a1'") for _ in range(40)]
        out.append("".join(chars))
    return out


def main(url: str, model: str, out: Path) -> None:
    """Ask the server and write the file."""
    entries = []
    for text in [*TEXTS, *random_texts(60)]:
        body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
        request = urllib.request.Request(f"{url}/tokenize", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            entries.append({"text": text, "ids": json.load(answer)["tokens"]})
    lines = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in entries)
    out.write_text(f'{{"model":{json.dumps(model)},"oracle":"llama.cpp","entries":[\n{lines}\n]}}\n')


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
