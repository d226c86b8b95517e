#!/usr/bin/env bash
# Evaluates a task sequence: answers the test set with the base model and with every stage's checkpoint, scores all
# of them per domain, and ends with the accuracy matrix (BWT, forgetting, FWT) and a page about everything, report.html.
#     bash cv805.sh
#     SEQUENCE=phantom BASE_MODEL=output/tiny-base bash cv805.sh
#     CUDA_VISIBLE_DEVICES=0,1,2,3 BASE_MODEL=liuhaotian/llava-v1.5-7b bash cv805.sh
#     LAUNCHER="srun --ntasks-per-node 8 --gpus-per-task 1" bash cv805.sh    # several machines: scripts/launchers.sh
# Finished work is skipped, interrupted work goes on where it stopped: run the same command again.
# Relative paths mean the folder in which the command is given.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# ---- settings: edit here, or set them in the environment ---------------------------------------------------------
SEQUENCE=${SEQUENCE:-vqa-rad}               # scripts/tasks/<name>.json, or a file
BASE_MODEL=${BASE_MODEL:-}                  # model under the stages; empty: the sequence's
OUTPUT_DIR=${OUTPUT_DIR:-output}            # holds the stage checkpoints, llava-<sequence>_<task>...
METHOD=${METHOD:-retrieval}                 # continual method whose stages are evaluated
ROUTE=${ROUTE:-}                            # empty: as trained; oracle: the task is given; none; or a router
ZERO_SHOT=${ZERO_SHOT:-1}                   # 1: also evaluate the base model alone
# GPUs to use, a process on each: CUDA_VISIBLE_DEVICES (NVIDIA) or HIP_VISIBLE_DEVICES (AMD), e.g. 0,1,2,3; unset: all
# of them; empty: the CPU.
export HOSTFILE=${HOSTFILE:-} LAUNCHER=${LAUNCHER:-}   # DeepSpeed's launcher; torchrun or srun: on all its processes
CHUNKS=${CHUNKS:-}                          # parts of the question file; empty: one for each device or process
EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-16}      # questions answered at a time
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-64}
FOLLOW_LINKS=${FOLLOW_LINKS:-0}             # 1: open pictures that are links out of their folder
DTYPE=${DTYPE:-}                            # of the weights: auto, float32, bfloat16, float16; empty: see docs/llava.md
TF32=${TF32:-}                              # True: products of float32 in TF32 (NVIDIA GPUs since Ampere)
CONV_MODE=${CONV_MODE:-}                    # empty: the stage's own conversation template
IMAGE_ASPECT_RATIO=${IMAGE_ASPECT_RATIO:-}  # empty: the stage's own picture mode; or pad, square, anyres
#ANSWER_SUFFIX=                             # unset: the stage's own text after each question
PICTURES=${PICTURES:-real}                  # or "real blank shuffled": what the pictures contribute, see README.md
PICTURE_SEED=${PICTURE_SEED:-0}             # which question gets which other picture
STALE=${STALE:-replace}                     # answers of other weights or settings: replace, or refuse
# ------------------------------------------------------------------------------------------------------------------

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false
launcher=(python -m llava.eval.evaluate_sequence)
if [ -n "$HOSTFILE$LAUNCHER" ]; then
    source "$root/scripts/launchers.sh"
    launch_with llava.eval.evaluate_sequence
fi
"${launcher[@]}" --sequence "$SEQUENCE" --base_model "$BASE_MODEL" \
    --output_dir "$OUTPUT_DIR" --method "$METHOD" --route "$ROUTE" --zero_shot "$ZERO_SHOT" --chunks "$CHUNKS" \
    --batch_size "$EVAL_BATCH_SIZE" --max_new_tokens "$MAX_NEW_TOKENS" --conv_mode "$CONV_MODE" \
    --image_aspect_ratio "$IMAGE_ASPECT_RATIO" --follow_links "$FOLLOW_LINKS" \
    ${ANSWER_SUFFIX+--answer_suffix "$ANSWER_SUFFIX"} --stale "$STALE" \
    ${DTYPE:+--dtype "$DTYPE"} ${TF32:+--tf32 "$TF32"} --pictures $PICTURES --picture_seed "$PICTURE_SEED" \
    --page 1
