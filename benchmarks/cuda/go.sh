#!/bin/sh
# The GPU run on a machine that may be bare and without a network.
#   go.sh pack [PYTHON_VERSION]  on a machine with a network: wheels of what the run needs besides torch, into build/cuda-wheels
#   go.sh run [arguments]        on the GPU machine: installs those wheels beside its own torch and starts run.py
# torch with CUDA and triton must be on the GPU machine; `run` says what is missing.
set -eu
cd "$(dirname "$0")/../.."
WHEELS=build/cuda-wheels
PACKAGES="msgspec numpy tokenizers jinja2 llguidance httpx2 typer rich prompt-toolkit starlette uvicorn uvloop httptools prometheus-client openai"
case "${1:-}" in
pack)
    python3 -m pip download --quiet --only-binary=:all: --python-version "${2:-3.12}" --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        -d "$WHEELS" $PACKAGES
    # What a GPU machine's torch brings itself would only make the parcel heavy.
    rm -f "$WHEELS"/numpy-* "$WHEELS"/huggingface_hub-* "$WHEELS"/hf_xet-*
    du -sh "$WHEELS"
    ;;
run)
    shift
    python3 -c 'import torch, sys; sys.exit(0 if torch.cuda.is_available() else "torch sees no GPU")'
    SITE="$(mktemp -d)"
    if ls "$WHEELS"/*.whl >/dev/null 2>&1; then
        python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$SITE" "$WHEELS"/*.whl
    fi
    # The repository's own packages need no build here: the native extension is the CPU backend's.
    PYTHONPATH="$PWD/src:$SITE:${PYTHONPATH:-}" exec python3 benchmarks/cuda/run.py "$@"
    ;;
*)
    sed -n '2,5s/^# *//p' "$0"
    exit 2
    ;;
esac
