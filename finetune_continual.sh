#!/usr/bin/env bash
# Stage 2: train the tasks of a sequence one after the other, each on its own slots, with DeepSpeed ZeRO-3.
#
#   bash finetune_continual.sh
#
# Finished tasks are skipped and an interrupted one goes on, so the same command may be given again at any time.
# Relative paths mean the folder in which the command is given.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# ---- settings: edit here, or set them in the environment; empty: what the task sequence says -------------------------
export SEQUENCE=${SEQUENCE:-vqa-rad}           # scripts/tasks/<name>.json, or a file
export BASE_MODEL=${BASE_MODEL:-}              # path or hub name, e.g. liuhaotian/llava-v1.5-7b
export OUTPUT_DIR=${OUTPUT_DIR:-output}
METHOD=${METHOD:-retrieval}                    # retrieval, or a baseline: sequential, joint
KEYS=${KEYS:-}                                 # merged keys; empty: those that merge_prompt_key.py writes
export ZERO=${ZERO:-}                          # DeepSpeed settings; "none" (the default on one GPU): without DeepSpeed
export HOSTFILE=${HOSTFILE:-} LAUNCHER=${LAUNCHER:-}   # several machines: scripts/launchers.sh has the words
# GPUs to use: CUDA_VISIBLE_DEVICES (NVIDIA) or HIP_VISIBLE_DEVICES (AMD); unset means all of them.
#export CUDA_VISIBLE_DEVICES=0,1,2,3
#export HIP_VISIBLE_DEVICES=0,1,2,3
export EPOCHS=${EPOCHS:-} LEARNING_RATE=${LEARNING_RATE:-} SEED=${SEED:-}
export BATCH_SIZE=${BATCH_SIZE:-} GRADIENT_ACCUMULATION=${GRADIENT_ACCUMULATION:-}   # the batch is per device
export MAX_LENGTH=${MAX_LENGTH:-} SAVE_STEPS=${SAVE_STEPS:-}
FOLLOW_LINKS=${FOLLOW_LINKS:-0}                # 1: open pictures that are links out of their folder
REPORT_TO=${REPORT_TO:-none}                   # tensorboard, wandb, ...: losses of every stage under its task's name
MASTER_PORT=${MASTER_PORT:-29500}
EXTRA_ARGS=${EXTRA_ARGS:-}                     # more flags for llava/train/train_mem.py, e.g. "--save_full_model True"
# ----------------------------------------------------------------------------------------------------------------------

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "${HIP_VISIBLE_DEVICES:-}" ] && [ -z "${CUDA_VISIBLE_DEVICES:-}" ]; then
    export CUDA_VISIBLE_DEVICES=$HIP_VISIBLE_DEVICES # PyTorch for ROCm reads either; DeepSpeed's launcher reads this one
fi

# Checked by a line of its own: a program that fails inside <(...) would go unnoticed.
of_sequence=$(python -m llava.continual.tasks variables "$SEQUENCE" tasks stages arguments=flags zero=train.zero \
    --method "$METHOD")
eval "$of_sequence"
gpus=$(python -c "import torch; print(torch.cuda.device_count())")
if [ -z "$zero" ]; then
    processes=$gpus # one device has nothing to share out
    if [ "$gpus" -gt 0 ] && [ -n "$HOSTFILE$LAUNCHER" ]; then processes=2; fi
    if [ "$processes" -le 1 ]; then zero=none; else zero=$root/scripts/zero3.json; fi
fi

# Everything that would stop a later task is looked for before the first one trains; not where flags name other inputs.
links=()
if [ "$FOLLOW_LINKS" != 0 ]; then links=(--follow_links); fi
case " $EXTRA_ARGS " in
    *_path* | *image_folder* | *state_dict*) ;;
    *) python -m llava.continual.tasks check "$SEQUENCE" --method "$METHOD" --keys "$KEYS" --zero "${zero/#none/}" \
        ${links[@]+"${links[@]}"} ;;
esac

arguments+=(--sequence "$SEQUENCE" --method "$METHOD" --save_strategy steps --logging_steps 10 --report_to "$REPORT_TO"
    --follow_links "$FOLLOW_LINKS")
if [ -n "$KEYS" ]; then arguments+=(--retriever_state_dict "$KEYS"); fi
if [ "$gpus" -gt 0 ]; then
    arguments+=(--gradient_checkpointing auto --dataloader_num_workers 4)
    [[ " ${arguments[*]} " == *" --bf16 "* ]] || arguments+=(--bf16 auto)
    launcher=(python -m deepspeed.launcher.runner --master_port "$MASTER_PORT")
    if [ -z "${CUDA_VISIBLE_DEVICES:-}" ]; then launcher+=(--num_gpus "$gpus"); fi
    launcher+=("$root/llava/train/train_mem.py")
    if [ "$gpus" = 1 ] && [ "$zero" = none ]; then launcher=(python -m llava.train.train_mem); fi
    echo "== training on $gpus GPU(s) with ${zero/none/no DeepSpeed}"
else
    arguments+=(--use_cpu True)
    launcher=(python -m llava.train.train_mem)
    if [ "$zero" = none ]; then
        echo "== no GPU: training on the CPU, plainly (ZERO=scripts/zero3.json trains the same under ZeRO-3)"
    elif python -c "from llava.train.deepspeed_config import prepare_cpu_deepspeed as p; p()" >/dev/null 2>&1; then
        echo "== no GPU: training on the CPU under DeepSpeed ($zero, gloo)"
    else
        echo "== no GPU, and DeepSpeed does not start on this CPU: training plainly, without ZeRO"
        zero=none
    fi
fi
if [ -n "$HOSTFILE$LAUNCHER" ]; then
    source "$root/scripts/launchers.sh"
    launch_with llava.train.train_mem
    echo "== on all processes of: ${LAUNCHER:-the machines in $HOSTFILE}"
fi
if [ "$zero" != none ]; then arguments+=(--deepspeed "$zero"); fi

for index in "${!tasks[@]}"; do
    echo "== task $((index + 1)) of ${#tasks[@]}: ${tasks[$index]} -> ${stages[$index]}"
    # shellcheck disable=SC2086 # EXTRA_ARGS is a list of words
    "${launcher[@]}" "${arguments[@]}" --task "${tasks[$index]}" $EXTRA_ARGS
done
echo "== all ${#tasks[@]} tasks are trained; evaluate with: SEQUENCE=$SEQUENCE ${BASE_MODEL:+BASE_MODEL=$BASE_MODEL }bash cv805.sh"
