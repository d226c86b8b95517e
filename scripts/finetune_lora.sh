#!/usr/bin/env bash
# Visual instruction tuning with a LoRA on the language model; the projector trains in full.
#
#   PROJECTOR=checkpoints/llava-v1.5-7b-pretrain/mm_projector.bin bash scripts/finetune_lora.sh
#
# QUANTISED=4 or 8 holds the language model in so many bits (QLoRA; with ZERO=scripts/zero2.json).
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
OUTPUT_DIR=${OUTPUT_DIR:-./checkpoints/llava-v1.5-7b-lora}   # its name must hold "llava"
LORA_RANK=${LORA_RANK:-128} LORA_ALPHA=${LORA_ALPHA:-256} PROJECTOR_RATE=${PROJECTOR_RATE:-2e-5}
QUANTISED=${QUANTISED:-16}
BATCH_SIZE=${BATCH_SIZE:-16} GRADIENT_ACCUMULATION=${GRADIENT_ACCUMULATION:-1}  # per device; 128 on eight GPUs
EPOCHS=${EPOCHS:-1} LEARNING_RATE=${LEARNING_RATE:-2e-4} MAX_LENGTH=${MAX_LENGTH:-2048} SAVE_STEPS=${SAVE_STEPS:-50000}
WORKERS=${WORKERS:-4} REPORT_TO=${REPORT_TO:-none}            # loader processes; where losses go, such as wandb
ZERO=${ZERO:-$root/scripts/zero3.json}                     # DeepSpeed settings, on GPUs
MASTER_PORT=${MASTER_PORT:-29500}
EXTRA_ARGS=${EXTRA_ARGS:-}                                   # more flags, e.g. "--lora_dropout 0"
# GPUs to use: CUDA_VISIBLE_DEVICES (NVIDIA) or HIP_VISIBLE_DEVICES (AMD); unset means all of them.
# ----------------------------------------------------------------------------------------------------------------------

source "$root/scripts/launch.sh"
launch --lora_enable True --lora_r "$LORA_RANK" --lora_alpha "$LORA_ALPHA" --mm_projector_lr "$PROJECTOR_RATE" \
    --bits "$QUANTISED" --image_aspect_ratio pad --group_by_modality_length True \
    ${PROJECTOR:+--pretrain_mm_mlp_adapter "$PROJECTOR"}
echo "== the LoRA is in $OUTPUT_DIR; merge it: python scripts/merge_lora_weights.py --model-path $OUTPUT_DIR \\
    --model-base $BASE_LM --save-model-path <folder>"
