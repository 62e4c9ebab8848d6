#!/bin/sh
# Build the extension into the source tree, for development: sh src/sagellm_backend/cpu/native/build.sh [cmake options]
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
root=$(CDPATH= cd -- "$here/../../../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
PATH=$(dirname -- "$python"):$PATH
cmake -S "$here" -B "$root/build/dev" -G Ninja -DPython_EXECUTABLE="$python" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$here/.." "$@" >/dev/null
cmake --build "$root/build/dev"
