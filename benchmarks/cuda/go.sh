#!/bin/sh
# The GPU run on a machine that may be bare and without a network.
#   go.sh pack [--python VERSION] [--there NAMES] [MODEL]
#                                          on a machine with a network: wheels of what the run needs besides torch (without NAMES,
#                                          which are there), and the model in pieces, into build/cuda-visit; prints what to do next
#   go.sh run [arguments]                  on the GPU machine: puts the pieces together, installs the wheels that it lacks beside
#                                          its own torch, and starts run.py
#   go.sh rehearse [arguments]             without a GPU: every line of the run at a tiny size (SAGELLM_PYTHON with torch and triton)
# torch with CUDA and triton must be on the GPU machine; the first section says what is missing.
set -eu
cd "$(dirname "$0")/../.."
HERE=build/cuda-visit
PIECE=38m  # with the tree and the wheels below 64 MiB, and so are the tree and what is left of 100 MB
PYTHON="${SAGELLM_PYTHON:-python3}"
PACKAGES="msgspec tokenizers jinja2 llguidance httpx2 typer rich prompt-toolkit starlette uvicorn uvloop httptools prometheus-client openai"
case "${1:-}" in
pack)
    shift
    VERSION=3.12
    THERE="numpy huggingface_hub hf_xet"
    if [ "${1:-}" = --python ]; then VERSION="$2"; shift 2; fi
    if [ "${1:-}" = --there ]; then THERE="$THERE $2"; shift 2; fi
    mkdir -p "$HERE/wheels"
    "$PYTHON" -m pip download --quiet --only-binary=:all: --python-version "$VERSION" --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        -d "$HERE/wheels" $PACKAGES
    # What a GPU machine's torch brings itself, or nobody imports, would only make the parcel heavy.
    for NAME in $THERE; do rm -f "$HERE/wheels/$(printf %s "$NAME" | tr '[:upper:]-' '[:lower:]_')"-*; done
    [ $# = 0 ] || split -b "$PIECE" -d "$1" "$HERE/$(basename "$1").piece"
    du -h "$HERE"/*
    printf '%s\n' "1. copy this tree, $HERE/wheels and the first piece; there: benchmarks/cuda/go.sh run"
    printf '%s\n' "2. copy the other pieces to what is there, in one go or in several; then there:" \
        "   benchmarks/cuda/go.sh run --sections probe,quality,serve --budget 150 --model $HERE/${1:+$(basename "$1")}"
    ;;
run)
    shift
    for FIRST in "$HERE"/*.piece00; do
        [ ! -e "$FIRST" ] || cat "${FIRST%00}"* >"${FIRST%.piece00}"
    done
    SITE="$(mktemp -d)"
    # Only what is not there: the machine's own packages were made for each other.
    MISSING="$("$PYTHON" - "$HERE"/wheels/*.whl <<'LACKS'
import importlib.metadata as metadata, pathlib, sys
there = {(d.metadata["Name"] or "").lower().replace("-", "_") for d in metadata.distributions()}
print(*(p for p in sys.argv[1:] if pathlib.Path(p).is_file() and pathlib.Path(p).name.split("-")[0].lower() not in there))
LACKS
)"
    [ -z "$MISSING" ] || "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$SITE" $MISSING
    # The repository's own packages need no build here: the native extension is the CPU backend's.
    PYTHONPATH="$PWD/src:$SITE:${PYTHONPATH:-}" exec "$PYTHON" benchmarks/cuda/run.py "$@"
    ;;
rehearse)
    shift
    OMP_NUM_THREADS=1 PYTHONPATH="$PWD/src:${PYTHONPATH:-}" exec "$PYTHON" benchmarks/cuda/run.py --rehearse "$@"
    ;;
*)
    sed -n '2,10s/^# *//p' "$0"
    exit 2
    ;;
esac
