#!/bin/bash
# One training run on several machines: sbatch slurm.sh config/completep_1p5b_deep.py --parallel=hsdp
# Two minutes before the time limit the run saves and stops, and the job is queued again to resume from there. Raise the
# 120 seconds if a step, a validation and a checkpoint take longer.
#SBATCH --job-name=nanoP
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
trap 'time_is_up=1; kill -USR1 $run' USR1
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" --rdzv-backend=c10d \
  --rdzv-endpoint="$first_host:29500" --rdzv-id="$SLURM_JOB_ID" --shutdown-timeout=110 \
  --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 \
  train.py "$@" --init_from=auto &
run=$!
wait $run  # returns when the run ends or the signal arrives
[ -n "$time_is_up" ] && wait $run && echo 'finished after all' && exit
[ -n "$time_is_up" ] && scontrol requeue "$SLURM_JOB_ID"
