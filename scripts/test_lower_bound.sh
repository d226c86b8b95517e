#!/usr/bin/env bash
# Runs the tests with the oldest transformers that pyproject.toml allows; everything else stays as scripts/setup_env.sh
# set it up. Arguments go to pytest.
#     bash scripts/test_lower_bound.sh -m "not slow"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh

version=$(sed -n 's/^ *"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml)
lower=.venv-lower
if ! "$lower/bin/python" -c "import transformers; assert transformers.__version__.startswith('$version')" 2>/dev/null
then
    echo "[test] making $lower: transformers $version on top of $(command -v python)"
    python -m venv --clear "$lower"
    # A .pth file lets the new environment see the packages of the full one behind its own.
    packages=$("$lower/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$packages/full_environment.pth"
    "$lower/bin/python" -m pip install --disable-pip-version-check -q "transformers==$version.*"
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
PATH="$PWD/$lower/bin:$PATH"
[ $# -gt 0 ] || set -- -n 2 --dist loadfile --no-loadscope-reorder   # as scripts/test.sh
echo "[test] python -m pytest $* (transformers $version)"
python -m pytest -ra --durations=5 "$@"
