#!/bin/bash
# The base: a language model from text, which all stages stand on.
# Submit it from the repository's root; overrides follow the name:
#   sbatch [--nodes=2 --gpus-per-node=8 ...] slurm/base.sh [trainer.lr=1e-4 ...]
#SBATCH --job-name=base
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
run_stage base "$@"
