#!/usr/bin/env bash
# Train a recipe on several machines under Slurm; set nodes, GPUs and time, then:
#
#     sbatch examples/cluster/slurm.sh solo-7b/stage1 root=/shared/runs
#
# Ten minutes before its time limit the job saves, queues itself again, and resumes where it stopped. It also
# resumes after the loss of a machine. The output directory must be on a file system that all machines share.
#SBATCH --job-name=solo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=solo-%j.log
set -euo pipefail

run=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# --tee and --log-dir: output of every process in logs/RUN, and of all together in solo-JOB.log.
# srun does not take --cpus-per-task from sbatch, so all processes of a machine would share one core.
srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} torchrun \
    --nnodes "$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-id "$run" --rdzv-backend c10d --rdzv-endpoint "$head:${PORT:-29500}" \
    --max-restarts 3 --shutdown-timeout 540 --log-dir "logs/$run" --tee 3 \
    -m solo_vlm train "$@" &
job=$!

stopped=
trap 'stopped=1; kill -TERM $job' TERM
while kill -0 $job 2>/dev/null; do # a trapped signal ends wait early
    wait $job || true
done
status=0
wait $job || status=$?

if [ -n "$stopped" ] && [ $status -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
