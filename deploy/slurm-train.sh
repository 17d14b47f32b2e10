#!/bin/bash
# A training on several machines of a SLURM cluster. Change: the numbers of machines and GPUs, the time, the environment, the config.
#
#   sbatch deploy/slurm-train.sh photos.yaml                # submit
#   sbatch deploy/slurm-train.sh photos.yaml --optim.lr 1e-3
#   scancel --signal=TERM --batch JOB                        # stop after a checkpoint; the same sbatch resumes
#
# The working folder, the data and the config must be on a file system that all machines share.
#SBATCH --job-name=refract
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# SLURM sends SIGTERM to this script 5 minutes before the end of the time. After a preemption it queues the job again.
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=refract-%j.log

set -uo pipefail

if [ "$#" -lt 1 ]; then
    echo "usage: sbatch slurm-train.sh CONFIG.yaml [--section.key value …]" >&2
    exit 2
fi

# shellcheck disable=SC1091
source "${REFRACT_ENVIRONMENT:-.venv}/bin/activate" || exit 2

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
PORT=$((20000 + SLURM_JOB_ID % 10000))

srun --kill-on-bad-exit=1 refract torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$HEAD:$PORT" \
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --max-restarts 3 \
    --log-dir "refract-logs/$SLURM_JOB_ID" \
    train "$@" --resume auto &
STEP=$!

# The ranks finish their step, write a checkpoint and end with 75.
trap 'scancel --signal=TERM "$SLURM_JOB_ID.0"' TERM
wait "$STEP"
CODE=$?
while kill -0 "$STEP" 2> /dev/null; do # the signal interrupted `wait`
    wait "$STEP"
    CODE=$?
done

if [ "$CODE" -eq 75 ] || [ "$CODE" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$CODE"
