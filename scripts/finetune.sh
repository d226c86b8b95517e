#!/usr/bin/env bash
# Visual instruction tuning, LLaVA's second stage: every weight trains but the tower's.
#
#   PROJECTOR=checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin bash scripts/finetune.sh
#
# With a LLaVA as BASE_LM and PROJECTOR= (empty) it goes on with that model, as LLaVA's finetune_task.sh does.
# A finished run is skipped and an interrupted one goes on, so the same command may be given again at any time.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# ---- settings: edit here, or set them in the environment -------------------------------------------------------------
BASE_LM=${BASE_LM:-lmsys/vicuna-7b-v1.5}                   # a language model, folder or hub name
VERSION=${VERSION:-v1}
DATA_PATH=${DATA_PATH:-./playground/data/llava_v1_5_mix665k.json}
IMAGE_FOLDER=${IMAGE_FOLDER:-./playground/data}
VISION_TOWER=${VISION_TOWER:-openai/clip-vit-large-patch14-336}
PROJECTOR_TYPE=${PROJECTOR_TYPE:-mlp2x_gelu} SELECT_LAYER=${SELECT_LAYER:--2}
PROJECTOR=${PROJECTOR-./checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin}  # empty: the base's own, or a new one
OUTPUT_DIR=${OUTPUT_DIR:-./checkpoints/llava-v1.5-7b}        # its name must hold "llava"
BATCH_SIZE=${BATCH_SIZE:-16} GRADIENT_ACCUMULATION=${GRADIENT_ACCUMULATION:-1}  # per device; 128 on eight GPUs
EPOCHS=${EPOCHS:-1} LEARNING_RATE=${LEARNING_RATE:-2e-5} MAX_LENGTH=${MAX_LENGTH:-2048} SAVE_STEPS=${SAVE_STEPS:-50000}
WORKERS=${WORKERS:-4} REPORT_TO=${REPORT_TO:-none}            # loader processes; where losses go, such as wandb
ZERO=${ZERO:-$root/scripts/zero3.json}                     # DeepSpeed settings, on GPUs
MASTER_PORT=${MASTER_PORT:-29500}
EXTRA_ARGS=${EXTRA_ARGS:-}                                   # more flags, e.g. "--freeze_backbone True"
# GPUs to use: CUDA_VISIBLE_DEVICES (NVIDIA) or HIP_VISIBLE_DEVICES (AMD); unset means all of them.
# ----------------------------------------------------------------------------------------------------------------------

source "$root/scripts/launch.sh"
launch --image_aspect_ratio pad --group_by_modality_length True \
    ${PROJECTOR:+--pretrain_mm_mlp_adapter "$PROJECTOR"}
echo "== the model is in $OUTPUT_DIR; ask it: python -m llava.serve.cli --model-path $OUTPUT_DIR --image-file <picture>"
