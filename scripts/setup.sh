#!/bin/sh
# Makes .venv with all that development, tests and the demo need. Started again, it does only what is missing.
set -eu
cd "$(dirname "$0")/.."
cache=${STARCODER_CACHE:-$HOME/.cache/starcoder-operator}
export UV_CACHE_DIR="${UV_CACHE_DIR:-$cache/uv}"
stamp=.venv/.requirements
want=$(cat requirements/dev.txt requirements/uv.txt pyproject.toml scripts/setup.sh | sha256sum | cut -d' ' -f1)
if [ -x .venv/bin/python ] && [ "$(cat $stamp 2>/dev/null)" = "$want" ]; then exit 0; fi

fits() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }
find_python() {
    for p in ${PYTHON:-} python3.13 python3.14 python3.12 python3 \
        "$HOME"/.pyenv/versions/3.13*/bin/python "$HOME"/.pyenv/versions/3.1[24]*/bin/python \
        /usr/local/bin/python3.1[2-9] /opt/python*/bin/python3 /opt/homebrew/bin/python3; do
        if fits "$p"; then command -v "$p"; return; fi
    done
    return 1
}
if ! python=$(find_python); then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "setup: no Python >= 3.12 with venv found; installing Debian's" >&2
        apt-get update -qq && apt-get install -y -qq --no-install-recommends python3 python3-venv >&2
    fi
    python=$(find_python) || {
        echo "setup: found no Python >= 3.12 with the venv module (looked on PATH, in ~/.pyenv/versions, /usr/local/bin, /opt)." >&2
        echo "setup: install one (pyenv install 3.13, uv python install 3.13, or your distribution's python3.13 and python3.13-venv)," >&2
        echo "setup: or name it: make PYTHON=/path/to/python3.13 ..." >&2
        exit 1
    }
fi
echo "setup: $("$python" --version) at $python; installing into .venv (the first time this fetches 3 GB, mostly torch)" >&2
rm -f $stamp
[ -x .venv/bin/python ] && fits .venv/bin/python || { rm -rf .venv; "$python" -m venv .venv; }
[ -x .venv/bin/uv ] || .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
# uv.txt last: sync removes what no file names
.venv/bin/uv pip sync --quiet --python .venv/bin/python --require-hashes requirements/dev.txt requirements/uv.txt
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e .
# once, on all cores: else the first test run compiles torch and all else on one. Packages carry files that can't be
# compiled (templates, old Python), which is no error of ours
.venv/bin/python -W ignore -m compileall -qq -j0 .venv/lib || true
echo "$want" > $stamp
