#!/usr/bin/env bash
# Evaluates a task sequence: answers the test set with the base model and with every stage's checkpoint, scores all
# of them per domain, and ends with the accuracy matrix (BWT, forgetting, FWT).
#     bash cv805.sh
#     SEQUENCE=phantom BASE_MODEL=output/tiny-base bash cv805.sh
#     CUDA_VISIBLE_DEVICES=0,1,2,3 BASE_MODEL=liuhaotian/llava-v1.5-7b bash cv805.sh
# Finished work is skipped, interrupted work goes on where it stopped: run the same command again.
# Relative paths mean the folder in which the command is given.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false

# ---- settings (each can be overridden from the environment) ----------------------------------------------------
SEQUENCE=${SEQUENCE:-vqa-rad}                       # task sequence: a file, or the name of one in scripts/tasks
BASE_MODEL=${BASE_MODEL:-}                          # model under the stages (--model-base); empty: the sequence's
export OUTPUT_DIR=${OUTPUT_DIR:-output}             # holds the stage checkpoints, llava-<sequence>_<task>...
METHOD=${METHOD:-retrieval}                         # continual method whose stages are evaluated
ROUTE=${ROUTE:-}                                    # empty: as trained; oracle: the task is given; or a router
ZERO_SHOT=${ZERO_SHOT:-1}                           # 1: also evaluate the base model alone
DEVICES=${CUDA_VISIBLE_DEVICES-${HIP_VISIBLE_DEVICES-all}}   # e.g. 0,1,2,3; all: every GPU; empty: the CPU
CHUNKS=${CHUNKS:-}                                  # processes at a time; empty: one per device
EVAL_BATCH_SIZE=${EVAL_BATCH_SIZE:-16}            # questions answered at a time
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-64}
CONV_MODE=${CONV_MODE:-}                            # empty: the stage's own conversation template
IMAGE_ASPECT_RATIO=${IMAGE_ASPECT_RATIO:-}          # empty: the stage's own picture mode; or pad, square, anyres
#ANSWER_SUFFIX=                                     # unset: the stage's own text after each question
STALE=${STALE:-replace}                             # answers of other weights or settings: replace, or refuse
# ----------------------------------------------------------------------------------------------------------------

say() { echo "[cv805] $*"; }
fail() { echo "error: $*" >&2; exit 2; }
field() { python -m llava.continual.tasks get "$SEQUENCE" "$1"; }

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT     # no chunk outlives this script

name=$(field name)
questions=$(field test)
images=$(field image_folder)
suffix=$(field answer_suffix)
train_files=$(field train)
stage_list=$(python -m llava.continual.tasks stages "$SEQUENCE" --output_dir "$OUTPUT_DIR" --method "$METHOD")
readarray -t train <<<"$train_files"
readarray -t stages <<<"$stage_list"
eval_dir=$OUTPUT_DIR/eval/$name
[ "$METHOD" = retrieval ] || eval_dir+=-$METHOD
[ -z "$ROUTE" ] || eval_dir+=-$ROUTE

if [ "$DEVICES" = all ]; then
    DEVICES=$(python -c "import torch; print(*range(torch.cuda.device_count()), sep=',')")
fi
IFS=, read -ra devices <<<"$DEVICES"
CHUNKS=${CHUNKS:-$(( ${#devices[@]} > 0 ? ${#devices[@]} : 1 ))}
if [ "${#devices[@]}" = 0 ] && [ "$CHUNKS" -gt 1 ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}    # processes that share cores slow each other down by spinning
fi

[ -f "$questions" ] || fail "question file not found: $questions (make it with: python fusion.py)"
for stage in "${stages[@]}"; do
    [ -d "$stage" ] || fail "stage checkpoint not found: $stage (train it with: bash finetune_continual.sh)"
done
BASE_MODEL=${BASE_MODEL:-$(field base_model)}

# answer_chunk INDEX FOLDER MODEL...: one chunk of the questions, on its own device
answer_chunk() {
    local index=$1 folder=$2
    shift 2
    if [ "${#devices[@]}" -gt 0 ]; then
        local device=${devices[$(( index % ${#devices[@]} ))]}
        export CUDA_VISIBLE_DEVICES=$device HIP_VISIBLE_DEVICES=$device
    fi
    python -m llava.eval.model_vqa_loader "$@" --question-file "$questions" --image-folder "$images" \
        --answers-file "$folder/chunks/${CHUNKS}_$index.jsonl" --num-chunks "$CHUNKS" --chunk-idx "$index" \
        --batch-size "$EVAL_BATCH_SIZE" --max_new_tokens "$MAX_NEW_TOKENS" --temperature 0 \
        --default-answer-suffix "$suffix" ${ANSWER_SUFFIX+--answer-suffix "$ANSWER_SUFFIX"} \
        ${CONV_MODE:+--conv-mode "$CONV_MODE"} ${IMAGE_ASPECT_RATIO:+--image_aspect_ratio "$IMAGE_ASPECT_RATIO"} \
        ${ROUTE:+--route "$ROUTE"} --stale "$STALE"
}

# answer FOLDER MODEL...: all chunks at once, each exit code checked, then joined
answer() {
    local folder=$1 index failed=0 pids=() parts=()
    shift
    mkdir -p "$folder/chunks"
    say "answering with $2: $CHUNKS chunk(s) on ${DEVICES:-the CPU}"
    for (( index = 0; index < CHUNKS; index++ )); do
        parts+=("$folder/chunks/${CHUNKS}_$index.jsonl")
        answer_chunk "$index" "$folder" "$@" &
        pids+=($!)
    done
    for index in "${!pids[@]}"; do
        wait "${pids[$index]}" || { failed=1; echo "error: chunk $index of $2 failed (message above)" >&2; }
    done
    [ "$failed" = 0 ] || exit 2
    python -m llava.eval.merge_chunks --question-file "$questions" --answers-file "$folder/answers.jsonl" \
        --chunks "${parts[@]}"
    answered+=("$folder/answers.jsonl")
}

answered=()
if [ "$ZERO_SHOT" = 1 ]; then
    answer "$eval_dir/zero-shot" --model-path "$BASE_MODEL"
fi
for stage in "${stages[@]}"; do
    answer "$eval_dir/$(basename "$stage")" --model-path "$stage" --model-base "$BASE_MODEL"
done

say "scoring ${#answered[@]} answer files"
python -m llava.eval.eval_video_qa --question-file "$questions" --answers-file "${answered[@]}" --train-file "${train[@]}"

scores=("${stages[@]##*/}")
scores=("${scores[@]/#/$eval_dir/}")
zero_shot=()
[ "$ZERO_SHOT" != 1 ] || zero_shot=(--zero-shot "$eval_dir/zero-shot/scores.json")
python -m llava.eval.accuracy_matrix --sequence "$SEQUENCE" --output-dir "$eval_dir" \
    --scores "${scores[@]/%//scores.json}" "${zero_shot[@]}"
