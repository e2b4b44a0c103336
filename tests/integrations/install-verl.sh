#!/usr/bin/env bash
# verl in an environment of its own: it excludes the transformers of constraints.txt.
set -euo pipefail
python=$1
install() {
    "$python" -m pip install --quiet --disable-pip-version-check --constraint tests/integrations/constraints-verl.txt "$@"
}
install torch==2.13.0 # first: on a machine with a GPU the same pin is a CUDA build
install --editable ".[verl]" pytest pytest-xdist
