#!/bin/bash
# One training on several machines. SLURM starts it again after its time limit, a preemption or a lost machine, and it
# resumes.
#   sbatch --nodes=2 --time=24:00:00 --gpus-per-node=8 --cpus-per-task=64 scripts/slurm/train_machines.sh \
#     model=rtdetrv2 data=auto data.root=...
# The current folder, the Python environment and the data must be on disks that all machines share.
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300

# SLURM starts this script on the first of the machines.
port=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a machine use different ports
# The first start makes a new run in the folder of the job, and every other one resumes it.
run=outputs/$SLURM_JOB_ID
resume=()
if [ -e "$run/run.json" ]; then resume=(trainer.resume=auto); fi
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" python -m detr_exp.torchrun \
  --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$SLURMD_NODENAME:$port" \
  -m detr_exp.train "$@" hydra.run.dir="$run" "${resume[@]}" &
ranks=$!
# Five minutes before the time limit SLURM sends USR1, only to this shell. The ranks receive it by scancel: a signal to
# srun itself would end them before they have saved. At a preemption SLURM sends TERM to the ranks.
trap 'scancel --signal=USR1 "$SLURM_JOB_ID"' USR1
trap : TERM

status=0
while kill -0 "$ranks" 2>/dev/null; do # a trap ends `wait` before the ranks have saved
  wait "$ranks"
  status=$?
done
if [ "$status" -eq 0 ]; then exit; fi
# 75: they have saved after USR1, or a machine was silent. A preempted job that ends within its grace time is not queued
# again by SLURM; a cancelled one is no longer RUNNING. A job that never saves anything does not go round for ever.
how="to resume: hydra.run.dir=$run trainer.resume=auto"
job=$(scontrol show job "$SLURM_JOB_ID") || echo "$how" >&2
if [[ $job == *JobState=RUNNING* && ($status -eq 75 || $job == *PreemptTime=[0-9]*) ]] &&
  { [ -e "$run/checkpoint.pth" ] || [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; }; then
  scontrol requeue "$SLURM_JOB_ID" || echo "$how" >&2
fi
exit "$status"
