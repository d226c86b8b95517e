#!/usr/bin/env bash
# Sourced by finetune_continual.sh and cv805.sh: start a Python module on all processes of a launcher, on one machine or
# on several that see the same folders under the same names.
#
#   HOSTFILE=hosts                    DeepSpeed's launcher: given on one machine, it reaches the others by ssh
#   LAUNCHER="torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint node0:29400" on each machine
#   LAUNCHER="srun --ntasks-per-node 8 --gpus-per-task 1 --kill-on-bad-exit"                 once, in a Slurm job
set -euo pipefail
settings='SEQUENCE|BASE_MODEL|ZERO|EPOCHS|LEARNING_RATE|SEED|BATCH_SIZE|GRADIENT_ACCUMULATION|MAX_LENGTH|SAVE_STEPS|LOGDIR'

launch_with() { # module -> the array "launcher"
    if [ -n "$HOSTFILE" ]; then
        # ssh takes no environment along; DeepSpeed gives every process what stands in this file.
        mkdir -p "$OUTPUT_DIR"
        export DS_ENV_FILE
        DS_ENV_FILE=$(realpath "$OUTPUT_DIR")/launch.env
        compgen -e | grep -E "^($settings|[A-Z_]+_DIR|(HF|LLAVA|KEY|OMP|TOKENIZERS)_[A-Z_]+)\$" |
            while read -r name; do printf '%s=%q\n' "$name" "${!name}"; done >"$DS_ENV_FILE"
        launcher=(python -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}"
            --no_local_rank --module "$1")
        return
    fi
    local words hosts
    read -ra words <<<"$LAUNCHER"
    case ${words[0]} in
        torchrun) launcher=(python -m torch.distributed.run "${words[@]:1}" -m "$1") ;;
        srun)
            export MASTER_PORT=${MASTER_PORT:-29500} MASTER_ADDR=${MASTER_ADDR:-}
            if [ -z "$MASTER_ADDR" ]; then
                hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # whole: a closed pipe would end it, and the script
                MASTER_ADDR=${hosts%%$'\n'*}
            fi
            # shellcheck disable=SC2016 # each process reads its own
            launcher=("${words[@]}" bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID \
                WORLD_SIZE=$SLURM_NTASKS; exec python -m "$@"' launched "$1")
            ;;
        *)
            echo "error: LAUNCHER is '$LAUNCHER'; it begins with torchrun or srun" >&2
            exit 2
            ;;
    esac
}
