"""Check our tokenizers against the vocabularies that llama.cpp ships for its own tests.

    python tests/tools/check_vocabularies.py DIRECTORY

DIRECTORY is ``models/`` of llama.cpp's source, or ``vendor/llama.cpp/models/`` of the sdist of llama-cpp-python: each
``ggml-vocab-*.gguf`` there has texts beside it (``.inp``) and their ids (``.out``).
"""

from __future__ import annotations

import sys
from pathlib import Path

from sagellm_core.text import load_tokenizer
from sagellm_protocol.errors import ModelFileError

SEPARATOR = "\n__ggml_vocab_test__\n"


def main(directory: Path) -> None:
    """Print a line for each vocabulary; exit 1 if an id differs."""
    wrong = 0
    for path in sorted(directory.glob("ggml-vocab-*.gguf")):
        texts, ids = Path(f"{path}.inp"), Path(f"{path}.out")
        if not texts.is_file():
            continue
        try:
            tokenizer = load_tokenizer(path)
        except ModelFileError as error:
            sys.stdout.write(f"{path.name}: refused: {str(error)[:80]}\n")
            continue
        cases = zip(texts.read_text(encoding="utf-8").split(SEPARATOR), ids.read_text().split("\n"), strict=False)
        bad = [
            text
            for text, line in cases
            if tokenizer.encode(text, add_special_tokens=False) != [int(i) for i in line.split()]
        ]
        sys.stdout.write(f"{path.name}: {len(bad)} differ{': ' + repr(bad[0][:60]) if bad else ''}\n")
        wrong += len(bad)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
