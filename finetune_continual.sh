#!/usr/bin/env bash
# Stage 2: train the tasks of a sequence one after the other, each on its own slots, with DeepSpeed ZeRO-3.
#
#   bash finetune_continual.sh
#
# Finished tasks are skipped and an interrupted one goes on, so the same command may be given again at any time.
set -euo pipefail
cd "$(dirname "$0")"

# ---- settings: edit here, or set them in the environment -----------------------------------------------------------
SEQUENCE=${SEQUENCE:-vqa-rad}                  # scripts/tasks/<name>.json, or a file
BASE_MODEL=${BASE_MODEL:-output/tiny-base}     # path or hub name, e.g. liuhaotian/llava-v1.5-7b
KEYS=${KEYS:-output/prompt-key/merged_prompt_key.pth}
OUTPUT_DIR=${OUTPUT_DIR:-output}
METHOD=${METHOD:-retrieval}                    # retrieval, or a baseline: sequential, joint
ZERO=${ZERO:-scripts/zero3.json}               # DeepSpeed settings; "none" trains without DeepSpeed
# GPUs to use: CUDA_VISIBLE_DEVICES (NVIDIA) or HIP_VISIBLE_DEVICES (AMD); unset means all of them.
#export CUDA_VISIBLE_DEVICES=0,1,2,3
#export HIP_VISIBLE_DEVICES=0,1,2,3
EPOCHS=${EPOCHS:-1}
LEARNING_RATE=${LEARNING_RATE:-2e-4}
BATCH_SIZE=${BATCH_SIZE:-4}                    # per device
GRADIENT_ACCUMULATION=${GRADIENT_ACCUMULATION:-1}
MAX_LENGTH=${MAX_LENGTH:-2048}
SAVE_STEPS=${SAVE_STEPS:-200}
SEED=${SEED:-42}
MASTER_PORT=${MASTER_PORT:-29500}
EXTRA_ARGS=${EXTRA_ARGS:-}                     # more flags for llava/train/train_mem.py, e.g. "--save_full_model True"
# ----------------------------------------------------------------------------------------------------------------------

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${HIP_VISIBLE_DEVICES:-}" ] && [ -z "${CUDA_VISIBLE_DEVICES:-}" ]; then
    export CUDA_VISIBLE_DEVICES=$HIP_VISIBLE_DEVICES # PyTorch for ROCm reads either; DeepSpeed's launcher reads this one
fi
gpus=$(python -c "import torch; print(torch.cuda.device_count())")

arguments=(
    --model_name_or_path "$BASE_MODEL" --sequence "$SEQUENCE" --method "$METHOD" --retriever_state_dict "$KEYS"
    --num_train_epochs "$EPOCHS" --learning_rate "$LEARNING_RATE" --lr_scheduler_type cosine --warmup_steps 0.03
    --weight_decay 0 --per_device_train_batch_size "$BATCH_SIZE" --gradient_accumulation_steps "$GRADIENT_ACCUMULATION"
    --model_max_length "$MAX_LENGTH" --save_strategy steps --save_steps "$SAVE_STEPS" --logging_steps 10 --seed "$SEED"
    --report_to none
)
if [ "$gpus" -gt 0 ]; then
    arguments+=(--bf16 True --gradient_checkpointing True --dataloader_num_workers 4)
    launcher=(python -m deepspeed.launcher.runner --master_port "$MASTER_PORT" llava/train/train_mem.py)
    if [ -z "${CUDA_VISIBLE_DEVICES:-}" ]; then launcher=("${launcher[@]:0:3}" --num_gpus "$gpus" "${launcher[@]:3}"); fi
    echo "== training on $gpus GPU(s) with ${ZERO/none/no DeepSpeed}"
else
    arguments+=(--use_cpu True)
    launcher=(python -m llava.train.train_mem)
    if [ "$ZERO" = none ]; then
        echo "== no GPU: training on the CPU, plainly (ZERO=scripts/zero3.json trains the same under ZeRO-3)"
    elif python -c "from llava.train.deepspeed_config import prepare_cpu_deepspeed as p; p()" >/dev/null 2>&1; then
        echo "== no GPU: training on the CPU under DeepSpeed ($ZERO, gloo)"
    else
        echo "== no GPU, and DeepSpeed does not start on this CPU: training plainly, without ZeRO"
        ZERO=none
    fi
fi
if [ "$ZERO" != none ]; then arguments+=(--deepspeed "$ZERO"); fi

mapfile -t tasks < <(python -m llava.continual.tasks get "$SEQUENCE" tasks)
mapfile -t stages < <(python -m llava.continual.tasks stages "$SEQUENCE" --output_dir "$OUTPUT_DIR" --method "$METHOD")
[ "${#tasks[@]}" -gt 0 ] && [ "${#tasks[@]}" -eq "${#stages[@]}" ] || exit 2 # the reason was printed above

previous=()
for index in "${!tasks[@]}"; do
    echo "== task $((index + 1)) of ${#tasks[@]}: ${tasks[$index]} -> ${stages[$index]}"
    # shellcheck disable=SC2086 # EXTRA_ARGS is a list of words
    "${launcher[@]}" "${arguments[@]}" --task "${tasks[$index]}" --output_dir "${stages[$index]}" "${previous[@]}" $EXTRA_ARGS
    previous=(--previous_stage "${stages[$index]}")
done
echo "== all ${#tasks[@]} tasks are trained; evaluate with: SEQUENCE=$SEQUENCE BASE_MODEL=$BASE_MODEL bash cv805.sh"
