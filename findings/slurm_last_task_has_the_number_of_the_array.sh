#!/usr/bin/env bash
# The last task of a Slurm array has the array's number as its own, so that requeueing "its" job requeues all tasks.
#
# Versions:  Slurm 22.05.8 of Debian 12; Linux x86_64.
# Behaviour: SLURM_JOB_ID differs from SLURM_ARRAY_JOB_ID in every task of an array but the last, in which the two are
#            the same. The line that scripts end with to go on after their time limit, "scontrol requeue $SLURM_JOB_ID", in
#            the last task, requeues the whole array, tasks that are running included; elsewhere it requeues the task alone.
#            "scontrol requeue ${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" does so in each of them.
# Seen:      task 0: job 23 of array 22, begun 2 times
#            task 1: job 24 of array 22, begun 2 times
#            task 2: job 22 of array 22, begun 2 times
# Needs a Slurm on which three tasks can run at a time, and where jobs may be requeued.
set -euo pipefail

skip() {
  echo "skipped: $1"
  exit 77
}
command -v sbatch >/dev/null || skip "there is no sbatch"
sinfo -h >/dev/null 2>&1 || skip "Slurm does not answer"
work=$(mktemp -d "${SHARED:-$PWD}/slurm-array.XXXXXX")   # SHARED: a directory that the nodes see, too
job=
trap 'rm -rf "$work"; [ -z "$job" ] || scancel "$job" 2>/dev/null || true' EXIT
cd "$work"

cat >array.sh <<'SH'
#!/bin/bash
#SBATCH --array=0-2
#SBATCH --output=task-%a
#SBATCH --open-mode=append
#SBATCH --time=2
#SBATCH --requeue
echo "job $SLURM_JOB_ID of array $SLURM_ARRAY_JOB_ID"
sleep 15
if [ "$SLURM_ARRAY_TASK_ID" = 2 ] && [ -z "${SLURM_RESTART_COUNT:-}" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
sleep 5
SH
job=$(timeout 20 sbatch --parsable array.sh) || skip "sbatch refuses the job"
for _ in $(seq 100); do
  [ -n "$(squeue -h -j "$job" 2>/dev/null)" ] || break
  sleep 1
done
begun=0
for task in 0 1 2; do
  [ -s "task-$task" ] || skip "task $task has not begun within 100 s"
  times=$(grep -c '^job' "task-$task" || true)
  echo "task $task: $(head -n 1 "task-$task"), begun $times times"
  begun=$((begun + times))
done
[ "$begun" = 6 ] || {
  echo "changed: the tasks have begun $begun times together, instead of 6"
  exit 1
}
