#!/usr/bin/env bash
# A benchmark: methods x orders x seeds over one task sequence, then a table.
#
#   bash scripts/run_benchmark.sh scripts/benchmarks/phantom.json
#
# Needs the sequence's data and base (quickstart.sh makes both). What is done is skipped, what was interrupted goes on,
# and ends with the same bytes: give the same command again at any time. With several devices the cells are shared out,
# a process on each. Relative paths mean the folder in which the command is given.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# ---- settings (each can be overridden from the environment) ----------------------------------------------------------
BENCHMARK=${1:-${BENCHMARK:-$root/scripts/benchmarks/phantom.json}}
export BASE_MODEL=${BASE_MODEL:-}          # empty: the sequence's
export OUTPUT_DIR=${OUTPUT_DIR:-output}    # results go into $OUTPUT_DIR/benchmarks/<name>
# GPUs to use: CUDA_VISIBLE_DEVICES (NVIDIA) or HIP_VISIBLE_DEVICES (AMD), e.g. 0,1,2,3; unset: all of them.
# ----------------------------------------------------------------------------------------------------------------------

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
devices=$(python -c "from llava.devices import visible_devices; print(*visible_devices())")
read -r -a devices <<<"$devices"
count=${#devices[@]}
if [ "$count" -le 1 ]; then
    python "$root/scripts/run_cells.py" "$BENCHMARK"
else
    workers=()
    trap 'kill "${workers[@]}" 2>/dev/null || true' EXIT
    for number in "${!devices[@]}"; do
        CUDA_VISIBLE_DEVICES=${devices[$number]} HIP_VISIBLE_DEVICES=${devices[$number]} \
            python "$root/scripts/run_cells.py" "$BENCHMARK" --worker "$number" --workers "$count" &
        workers+=($!)
    done
    for worker in "${workers[@]}"; do wait "$worker"; done
fi
python -m llava.eval.benchmark_table "$BENCHMARK"
