#!/usr/bin/env bash
# Sourced by pretrain.sh, finetune.sh and finetune_lora.sh: their settings become one run of train_mem.py, with
# DeepSpeed on the GPUs there are, plainly on a CPU.
set -euo pipefail

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${HIP_VISIBLE_DEVICES:-}" ] && [ -z "${CUDA_VISIBLE_DEVICES:-}" ]; then
    export CUDA_VISIBLE_DEVICES=$HIP_VISIBLE_DEVICES # PyTorch for ROCm reads both; DeepSpeed's launcher this one
fi

launch() {
    local gpus arguments
    gpus=$(python -c "import torch; print(torch.cuda.device_count())")
    arguments=(
        --model_name_or_path "$BASE_LM" --version "$VERSION" --data_path "$DATA_PATH"
        --image_folder "$IMAGE_FOLDER" --vision_tower "$VISION_TOWER" --mm_projector_type "$PROJECTOR_TYPE"
        --mm_vision_select_layer "$SELECT_LAYER" --mm_use_im_start_end False --mm_use_im_patch_token False
        --output_dir "$OUTPUT_DIR" --num_train_epochs "$EPOCHS"
        --per_device_train_batch_size "$BATCH_SIZE" --gradient_accumulation_steps "$GRADIENT_ACCUMULATION"
        --learning_rate "$LEARNING_RATE" --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine
        --save_strategy steps --save_steps "$SAVE_STEPS" --save_total_limit 1 --logging_steps 1
        --model_max_length "$MAX_LENGTH" --dataloader_num_workers "$WORKERS" --report_to "$REPORT_TO" "$@"
    )
    if [ "$gpus" -eq 0 ]; then
        echo "== no GPU: training on the CPU, plainly -> $OUTPUT_DIR"
        # shellcheck disable=SC2086 # EXTRA_ARGS is a list of words
        python -m llava.train.train_mem "${arguments[@]}" --use_cpu True $EXTRA_ARGS
        return
    fi
    echo "== training on $gpus GPU(s) with $ZERO -> $OUTPUT_DIR"
    arguments+=(--deepspeed "$ZERO" --bf16 auto --tf32 True --gradient_checkpointing True)
    # shellcheck disable=SC2086
    python -m deepspeed.launcher.runner --master_port "$MASTER_PORT" "$root/llava/train/train_mem.py" \
        "${arguments[@]}" $EXTRA_ARGS
}
