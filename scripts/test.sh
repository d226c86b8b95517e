#!/usr/bin/env bash
# Sets up an environment where there is none and runs the tests. Arguments go to pytest:
#     bash scripts/test.sh                       everything, in two processes
#     bash scripts/test.sh --fast                the inner loop: what is not marked slow, likewise
#     bash scripts/test.sh --thorough            everything, and the combinations that others stand for
#     bash scripts/test.sh tests/data/test_labels.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh

# A file's tests share what its fixtures make; the order is tests/conftest.py's.
chosen=(-n 2 --dist loadfile --no-loadscope-reorder)
if [ "${1:-}" = --fast ]; then
    chosen+=(-m "not slow")
    shift
elif [ $# -gt 0 ] && [ "$1" != --thorough ]; then
    chosen=()
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # spinning threads slow small models down
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
echo "[test] python -m pytest ${chosen[*]-} $*"
python -m pytest -ra --durations=15 ${chosen[@]+"${chosen[@]}"} "$@"
