#!/usr/bin/env bash
# A benchmark: methods x orders x seeds over one task sequence, then a table and a page, report.html.
#
#   bash scripts/run_benchmark.sh scripts/benchmarks/phantom.json
#
# Needs the sequence's data and base (quickstart.sh makes both). What is done is skipped, what was interrupted goes on,
# and ends with the same bytes: give the same command again at any time. Cells run side by side where there are several
# devices, a process on each, or where WORKERS asks for more. Relative paths mean the folder in which the command is
# given.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# ---- settings (each can be overridden from the environment) ----------------------------------------------------------
BENCHMARK=${1:-${BENCHMARK:-$root/scripts/benchmarks/phantom.json}}
export BASE_MODEL=${BASE_MODEL:-}          # empty: the sequence's
export OUTPUT_DIR=${OUTPUT_DIR:-output}    # results go into $OUTPUT_DIR/benchmarks/<name>
WORKERS=${WORKERS:-}                       # processes that share the cells; empty: the file's, else one a device
# GPUs to use: CUDA_VISIBLE_DEVICES (NVIDIA) or HIP_VISIBLE_DEVICES (AMD), e.g. 0,1,2,3; unset: all of them.
# ----------------------------------------------------------------------------------------------------------------------

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
python=$(command -v python || command -v python3)
"$python" "$root/scripts/run_cells.py" "$BENCHMARK" --workers "$WORKERS"

page=("$python" -m llava.eval.report "$OUTPUT_DIR/benchmarks/$(basename "$BENCHMARK" .json)")
"${page[@]}" || echo "no page, for the reason above; the results are whole. Again: ${page[*]}" >&2
