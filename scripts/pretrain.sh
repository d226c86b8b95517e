#!/usr/bin/env bash
# Feature alignment, LLaVA's first stage: the projector learns to tell a frozen language model what the tower sees.
#
#   BASE_LM=lmsys/vicuna-7b-v1.5 DATA_PATH=captions.json IMAGE_FOLDER=pictures bash scripts/pretrain.sh
#
# Writes mm_projector.bin and config.json, which scripts/finetune.sh begins with.
# A finished run is skipped and an interrupted one goes on, so the same command may be given again at any time.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# ---- settings: edit here, or set them in the environment -------------------------------------------------------------
BASE_LM=${BASE_LM:-lmsys/vicuna-7b-v1.5}                   # a language model, folder or hub name
VERSION=${VERSION:-plain}
DATA_PATH=${DATA_PATH:-./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}
IMAGE_FOLDER=${IMAGE_FOLDER:-./playground/data/LLaVA-Pretrain/images}
VISION_TOWER=${VISION_TOWER:-openai/clip-vit-large-patch14-336}
PROJECTOR_TYPE=${PROJECTOR_TYPE:-mlp2x_gelu} SELECT_LAYER=${SELECT_LAYER:--2}
OUTPUT_DIR=${OUTPUT_DIR:-./checkpoints/llava-v1.5-7b-pretrain}  # its name must hold "llava"
BATCH_SIZE=${BATCH_SIZE:-32} GRADIENT_ACCUMULATION=${GRADIENT_ACCUMULATION:-1}  # per device; 256 on eight GPUs
EPOCHS=${EPOCHS:-1} LEARNING_RATE=${LEARNING_RATE:-1e-3} MAX_LENGTH=${MAX_LENGTH:-2048} SAVE_STEPS=${SAVE_STEPS:-24000}
WORKERS=${WORKERS:-4} REPORT_TO=${REPORT_TO:-none}            # loader processes; where losses go, such as wandb
ZERO=${ZERO:-$root/scripts/zero2.json}                     # DeepSpeed settings, on GPUs
MASTER_PORT=${MASTER_PORT:-29500}
EXTRA_ARGS=${EXTRA_ARGS:-}                                   # more flags, e.g. "--image_aspect_ratio pad"
# GPUs to use: CUDA_VISIBLE_DEVICES (NVIDIA) or HIP_VISIBLE_DEVICES (AMD); unset means all of them.
# ----------------------------------------------------------------------------------------------------------------------

source "$root/scripts/launch.sh"
launch --tune_mm_mlp_adapter True
echo "== the projector is in $OUTPUT_DIR; next: PROJECTOR=$OUTPUT_DIR/mm_projector.bin bash scripts/finetune.sh"
