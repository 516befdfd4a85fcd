#!/bin/bash
# One training run on several machines: sbatch slurm.sh config/completep_1p5b_deep.py --parallel=hsdp
# Pre-empted, or two minutes before its time is up, it saves, leaves, and is queued again, to go on from there.
#SBATCH --job-name=nanoP
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

first_host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" \
  --rdzv-backend=c10d --rdzv-endpoint="$first_host:29500" --rdzv-id="$SLURM_JOB_ID" \
  train.py "$@" --init_from=auto
