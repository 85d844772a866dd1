#!/bin/bash
# sbatch deploy/train/slurm.sh deploy/train/64-gpus.yaml /shared/runs/hope-1.3b
#SBATCH --job-name=nestlearn
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
set -euo pipefail
settings=$1 out=$2
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# A requeued job goes on from its last checkpoint.
resume=$([ -e "$out/train_config.json" ] && echo --resume || echo --config "$settings")
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
  --rdzv-id "$SLURM_JOB_ID" -m nestlearn train $resume --out "$out"
