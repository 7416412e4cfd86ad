#!/bin/sh
# Writes requirements/*.txt: every dependency pinned with its hashes, no index address. Run after a change of pyproject.toml.
set -eu
cd "$(dirname "$0")/.."
compile() {
    out=$1; shift
    "${UV:-.venv/bin/uv}" pip compile --quiet --python-version 3.12 --universal --generate-hashes --no-header --no-annotate \
        --no-emit-index-url --no-emit-find-links "$@" -o "requirements/$out.txt"
}
compile operator pyproject.toml --extra operator
compile trainer pyproject.toml --extra trainer
compile dev pyproject.toml --extra operator --extra trainer --extra dev
echo uv | compile uv -
