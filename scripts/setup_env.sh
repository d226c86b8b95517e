#!/usr/bin/env bash
# Gives the scripts that source it a `python` with everything the project needs. To work by hand:
#     bash scripts/setup_env.sh && source .venv/bin/activate
# - an active environment that fits is used as it is, nothing is installed into it;
# - otherwise .venv is made and filled (about 3 minutes, 2 to 3 GB), and reused until pyproject.toml or
#   constraints.txt change;
# - on a GPU machine the torch that python3 already has is kept and used by .venv.
set -euo pipefail

setup_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# ---- settings (each can be overridden from the environment) ----------------------------------------------------
PYTHON=${PYTHON:-python3}                    # makes .venv; 3.10 or newer
VENV=${VENV:-$setup_root/.venv}
TORCH_SPEC=${TORCH_SPEC:-torch==2.13.0}      # what is installed where no GPU torch is found
TORCH_INDEX_URL=${TORCH_INDEX_URL:-}         # package index of a CPU, CUDA or ROCm build, see README
EXTRAS=${EXTRAS:-dev}
# ----------------------------------------------------------------------------------------------------------------

# Names start with setup_ and are taken back at the end: a script that sources this one keeps its own.
export PYTHONPATH="$setup_root${PYTHONPATH:+:$PYTHONPATH}"

setup_say() { echo "[setup] $*"; }

setup_fits() { "$1" "$setup_root/scripts/check_env.py" ${EXTRAS//,/ } 2>/dev/null; }

setup_stamp() {
    cat "$setup_root"/{pyproject.toml,constraints.txt} <(echo "$TORCH_SPEC $TORCH_INDEX_URL $EXTRAS") | cksum
}

setup_has_gpu_torch() { "$1" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

setup_install() {
    local pip=("$VENV/bin/python" -m pip install --disable-pip-version-check -q) constraints="$VENV/constraints.txt"
    if setup_has_gpu_torch "$PYTHON"; then
        setup_say "keeping the torch of $(command -v "$PYTHON"), which sees a GPU"
        grep -v '^torch==' "$setup_root/constraints.txt" >"$constraints"
    else
        cp "$setup_root/constraints.txt" "$constraints"
        setup_say "installing $TORCH_SPEC first and alone, so that nothing else chooses a torch"
        "${pip[@]}" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$TORCH_SPEC"
        [ "$TORCH_SPEC" = torch==2.13.0 ] || grep -v '^torch==' "$setup_root/constraints.txt" >"$constraints"
    fi
    # The exact versions exist for Python 3.11 and newer; 3.10 gets the newest that fit pyproject.toml.
    "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || : >"$constraints"
    setup_say "installing the package with its dependencies [$EXTRAS]"
    DS_BUILD_OPS=0 "${pip[@]}" -c "$constraints" -e "$setup_root[$EXTRAS]"
}

if setup_why=$(setup_fits python); then
    setup_say "using the active environment: $(command -v python)"
else
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
        echo "error: $PYTHON is missing or older than 3.10 (install Python 3.10 or newer, or set PYTHON)" >&2
        exit 2
    }
    if [ "$(cat "$VENV/.stamp" 2>/dev/null)" = "$(setup_stamp)" ]; then
        setup_say "using $VENV"
    else
        setup_say "the active python does not fit (${setup_why:-no python}); making $VENV with $("$PYTHON" --version)"
        setup_has_gpu_torch "$PYTHON" && setup_site=--system-site-packages || setup_site=
        "$PYTHON" -m venv $setup_site "$VENV" || {
            echo "error: $PYTHON cannot make a virtual environment (on Debian: apt install python3-venv)" >&2
            exit 2
        }
        setup_install
        setup_stamp >"$VENV/.stamp"
    fi
    # shellcheck disable=SC1091
    source "$VENV/bin/activate"
fi
PYTHON=python   # from here on, for every script that is started
unset -f setup_say setup_fits setup_stamp setup_has_gpu_torch setup_install
unset setup_root setup_why setup_site
