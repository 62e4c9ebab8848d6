#!/bin/sh
# Rebuild the extension where the environment loads it from, for development: sh src/sagellm_backend/cpu/native/build.sh [cmake options]
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
root=$(CDPATH= cd -- "$here/../../../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
PATH=$(dirname -- "$python"):$PATH
place() {
  "$python" -c "import importlib.util as u, os; s = u.find_spec('$1'); print(os.path.dirname(s.origin) if s else '')"
}
to=$(place sagellm_backend.cpu._native)
text=$(place sagellm_core.text._bpe)
cmake -S "$here" -B "$root/build/dev" -G Ninja -DPython_EXECUTABLE="$python" \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="${to:-$here/..}" -DSAGE_TEXT_DIRECTORY="${text:-$root/src/sagellm_core/text}" "$@" >/dev/null
cmake --build "$root/build/dev"
