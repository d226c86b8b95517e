#!/usr/bin/env bash
# Sets up an environment where there is none and runs the tests. Arguments go to pytest:
#     bash scripts/test.sh                       everything
#     bash scripts/test.sh -m "not slow"         without the long ones
#     bash scripts/test.sh tests/data/test_labels.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # spinning threads slow small models down
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
echo "[test] python -m pytest $*"
python -m pytest -ra --durations=15 "$@"
