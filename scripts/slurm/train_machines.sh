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
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 # seconds in which the ranks save after TERM

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a machine use different ports
# The folder is named by the job, so the first start finds no run in it, and every other one resumes.
run=outputs/$SLURM_JOB_ID
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" python -m torch.distributed.run \
  --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
  --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:$port" \
  -m detr_exp.train "$@" hydra.run.dir="$run" trainer.resume=auto &
ranks=$!

# Five minutes before the time limit SLURM sends USR1, only to this shell. The ranks receive TERM by scancel: a TERM to
# srun would kill them before they have saved.
time_is_over=false
save() {
  time_is_over=true
  scancel --signal=TERM "$SLURM_JOB_ID"
}
trap save USR1
trap : TERM # SLURM sends it to the ranks, too; this shell waits until they have saved

status=0
while kill -0 "$ranks" 2>/dev/null; do # a trap ends `wait` before the ranks have saved
  wait "$ranks"
  status=$?
done
# A preempted job that ends within its grace time is not requeued by SLURM; a cancelled one is no longer RUNNING.
job=$(scontrol show job "$SLURM_JOB_ID")
if [[ $status -ne 0 && $job == *JobState=RUNNING* ]] && { $time_is_over || [[ $job == *PreemptTime=[0-9]* ]]; } &&
  { [ -e "$run/checkpoint.pth" ] || [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; }; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
