"""Make a copy of a GGUF file in another precision, from the values of the first: the same weights for every contender.

python benchmarks/cpu/requantise.py MODEL.gguf Q4_0 OUT.gguf
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sagellm_backend.quant import dequantize, quantize
from sagellm_backend.tensors import Format, Tensor
from sagellm_core.loader.gguf import GGUFArray, read_header
from sagellm_core.loader.gguf_write import write_gguf

FILE_TYPES = {"F32": 0, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}


def requantise(source: Path, name: str, target: Path) -> None:
    """Write `target`: every matrix of `source` in the format `name`, vectors as they are."""
    fmt = Format[name]
    header = read_header(source)
    metadata = {key: list(value) if isinstance(value, GGUFArray) else value for key, value in header.metadata.items()}
    metadata["general.file_type"] = FILE_TYPES[name]
    tensors: dict[str, Tensor] = {}
    for tensor_name in header.tensors:
        tensor = header.tensor(tensor_name)
        matrix = len(tensor.shape) > 1 and tensor.shape[-1] % fmt.block == 0
        tensors[tensor_name] = quantize(dequantize(tensor), fmt) if matrix else tensor
    write_gguf(target, metadata, tensors)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("format", choices=sorted(FILE_TYPES))
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    requantise(args.source, args.format, args.target)


if __name__ == "__main__":
    main()
