#!/bin/bash
# A training on several machines of a SLURM cluster. Change: the numbers of machines and GPUs, the time, the environment, the config.
#
#   sbatch deploy/slurm-train.sh photos.yaml                # submit
#   sbatch deploy/slurm-train.sh photos.yaml --optim.lr 1e-3
#   scancel --signal=TERM --batch JOB                        # stop after a checkpoint, for good; the same sbatch resumes
#
# The working folder, the data and the config must be on a file system that all machines share.
#SBATCH --job-name=refract
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# SLURM sends SIGUSR1 to this script 5 minutes before the end of the time: only then the script queues the job again.
# After a preemption SLURM does so.
#SBATCH --signal=B:USR1@300
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

TIME_IS_UP=0
SIGNALLED=0
# The ranks finish their step, write a checkpoint and end with 75.
stop() {
    SIGNALLED=1
    scancel --signal=TERM "$SLURM_JOB_ID.0"
}
trap 'TIME_IS_UP=1; stop' USR1
trap stop TERM

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

while true; do
    wait "$STEP"
    CODE=$?
    [ "$SIGNALLED" -eq 1 ] || break
    SIGNALLED=0 # a signal may have interrupted `wait`, whose code is then not that of the ranks
done

if [ "$CODE" -eq 75 ] && [ "$TIME_IS_UP" -eq 1 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$CODE"
