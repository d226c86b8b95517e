#!/usr/bin/env bash
# Gives the scripts that source it a `python` with everything the project needs. To work by hand:
#     bash scripts/setup_env.sh && source .venv/bin/activate
# - an active environment that fits is used as it is, nothing is installed into it;
# - otherwise .venv is made and filled (about 3 minutes, 2 to 3 GB), and reused until pyproject.toml or
#   constraints.txt change;
# - on a GPU machine the torch that python3 already has is kept and used by .venv.
set -euo pipefail

# ---- settings (each can be overridden from the environment) ----------------------------------------------------
PYTHON=${PYTHON:-python3}                    # makes .venv; 3.10 or newer
VENV=${VENV:-.venv}
TORCH_SPEC=${TORCH_SPEC:-torch==2.13.0}      # what is installed where no GPU torch is found
TORCH_INDEX_URL=${TORCH_INDEX_URL:-}         # package index of a CPU, CUDA or ROCm build, see README
EXTRAS=${EXTRAS:-dev}
# ----------------------------------------------------------------------------------------------------------------

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

say() { echo "[setup] $*"; }

fits() { "$1" scripts/check_env.py ${EXTRAS//,/ } 2>/dev/null; }

stamp_text() { cat pyproject.toml constraints.txt <(echo "$TORCH_SPEC $TORCH_INDEX_URL $EXTRAS") | cksum; }

has_gpu_torch() { "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

install_into_venv() {
    local pip="$VENV/bin/python -m pip install --disable-pip-version-check -q" constraints="$VENV/constraints.txt"
    if has_gpu_torch "$PYTHON"; then
        say "keeping the torch of $(command -v "$PYTHON"), which sees a GPU"
        grep -v '^torch==' constraints.txt >"$constraints"
    else
        cp constraints.txt "$constraints"
        say "installing $TORCH_SPEC first and alone, so that nothing else chooses a torch"
        $pip ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$TORCH_SPEC"
        [ "$TORCH_SPEC" = torch==2.13.0 ] || grep -v '^torch==' constraints.txt >"$constraints"
    fi
    # The exact versions exist for Python 3.11 and newer; 3.10 gets the newest that fit pyproject.toml.
    "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || : >"$constraints"
    say "installing the package with its dependencies [$EXTRAS]"
    DS_BUILD_OPS=0 $pip -c "$constraints" -e ".[$EXTRAS]"
}

if why=$(fits python); then
    say "using the active environment: $(command -v python)"
else
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
        echo "error: $PYTHON is missing or older than 3.10 (install Python 3.10 or newer, or set PYTHON)" >&2
        exit 2
    }
    if [ "$(cat "$VENV/.stamp" 2>/dev/null)" = "$(stamp_text)" ]; then
        say "using $VENV"
    else
        say "the active python does not fit (${why:-no python}); making $VENV with $("$PYTHON" --version)"
        has_gpu_torch "$PYTHON" && site=--system-site-packages || site=
        "$PYTHON" -m venv $site "$VENV" || {
            echo "error: $PYTHON cannot make a virtual environment (on Debian: apt install python3-venv)" >&2
            exit 2
        }
        install_into_venv
        stamp_text >"$VENV/.stamp"
    fi
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
fi
PYTHON=python   # from here on, for every script that is started
