#!/bin/bash
# One training on one machine. SLURM starts it again after its time limit, a preemption or a lost machine; it resumes.
#   sbatch --time=24:00:00 --gpus-per-node=8 --cpus-per-task=64 scripts/slurm/train.sh \
#     trainer.hardware.devices=auto model=rtdetrv2 data=auto data.root=...
# The current folder, the Python environment and the data must be on disks that all machines share.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300

# The first start makes a new run in the folder of the job, and every other one resumes it.
run=outputs/$SLURM_JOB_ID
resume=()
if [ -e "$run/run.json" ]; then resume=(trainer.resume=auto); fi
python -m detr_exp.train "$@" hydra.run.dir="$run" "${resume[@]}" &
training=$!
# Five minutes before the time limit SLURM sends USR1, only to this shell; at a preemption it sends TERM.
for name in USR1 TERM; do
  trap "kill -$name $training" "$name"
done

status=0
while kill -0 "$training" 2>/dev/null; do # a trap ends `wait` before the training has saved
  wait "$training"
  status=$?
done
# 75: it has saved after USR1. A job whose limit is too short to save anything does not go round for ever.
if [ "$status" -eq 75 ] && { [ -e "$run/checkpoint.pth" ] || [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; }; then
  scontrol requeue "$SLURM_JOB_ID" || echo "to resume: hydra.run.dir=$run trainer.resume=auto" >&2
fi
exit "$status"
