#!/bin/bash
# Stage 3 assembles the experts and tunes the mixture.
# Submit it from the repository's root; overrides follow the name:
#   sbatch [--nodes=2 --gpus-per-node=8 ...] slurm/stage3.sh [trainer.lr=1e-4 ...]
#SBATCH --job-name=stage3
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=04:00:00
#SBATCH --output=slurm/logs/%x-%j.log
#SBATCH --open-mode=append
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}" # Slurm runs a copy of this file that lies elsewhere
if [[ ! -f slurm/lib/run.sh ]]; then
  echo "error: submit it from the repository's root, not from $PWD" >&2
  exit 2
fi
# shellcheck source=slurm/lib/run.sh
source slurm/lib/run.sh
run_stage stage3 "$@"
