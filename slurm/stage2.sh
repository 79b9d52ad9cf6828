#!/bin/bash
# Stage 2 makes one modality-specialised expert.
# Submit it from the repository's root; overrides follow the name:
#   sbatch [--nodes=2 --gpus-per-node=8 ...] slurm/stage2.sh stage.expert=speech [trainer.lr=1e-4 ...]
#   sbatch --array=0-2 slurm/stage2.sh          all three experts: 0 image, 1 speech, 2 audio
#SBATCH --job-name=stage2
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
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
  experts=(image speech audio)
  ((SLURM_ARRAY_TASK_ID < ${#experts[@]})) ||
    fail "there is no expert $SLURM_ARRAY_TASK_ID: use --array=0-2 or a part of it"
  set -- "stage.expert=${experts[SLURM_ARRAY_TASK_ID]}" "$@"
fi
run_stage stage2 "$@"
