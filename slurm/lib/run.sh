# shellcheck shell=bash
# Runs one stage inside a Slurm allocation; sourced by slurm/stage*.sh.
#
#   run_stage RECIPE [hydra override ...]
#
# Composes the recipe once, here on the batch host, then starts the processes of every node
# with the resolved file. Returns what the training returns; 2 if the recipe or the set-up is wrong.
#
# Settings (environment):
#   VENV    virtual environment, visible on every node; default .venv of the submit directory
#   NPROC   processes per node; default the GPUs per node, or without GPUs the CPUs per task

fail() {
  echo "error: $*" >&2
  exit 2
}

# One process per GPU; without GPUs one per CPU of the node's task.
processes_per_node() {
  if [[ -n ${NPROC:-} ]]; then
    echo "$NPROC"
  elif ((${SLURM_GPUS_ON_NODE:-0} > 0)); then
    echo "$SLURM_GPUS_ON_NODE"
  else
    echo "${SLURM_CPUS_PER_TASK:-1}"
  fi
}

# The address on which the first node of the job is reached by the others.
head_address() {
  local first
  if ((SLURM_NNODES == 1)); then
    echo 127.0.0.1
    return
  fi
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
  srun --nodes=1 --ntasks=1 --nodelist="$first" hostname --ip-address | awk '{print $1}'
}

run_stage() {
  local recipe=$1 python=${VENV:-$PWD/.venv}/bin/python cpus=${SLURM_CPUS_PER_TASK:-1}
  local processes config address port labels=()
  shift
  [[ -n ${SLURM_JOB_ID:-} ]] ||
    fail "submit it: sbatch slurm/$recipe.sh (without Slurm: python -m unimoe_mcore.launch $recipe)"
  [[ -x $python ]] ||
    fail "there is no Python at $python: make the virtual environment, or name it in VENV"
  processes=$(processes_per_node)

  # The recipe checks its layout against the size of this job. A wrong recipe ends the job here.
  config=$("$python" -m unimoe_mcore.compose "$recipe" \
    "parallel.processes=$((SLURM_NNODES * processes))" "$@")

  address=$(head_address)
  port=$((20000 + SLURM_JOB_ID % 10000)) # below Linux's ephemeral ports; another one for each job
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > processes ? cpus / processes : 1))}
  export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
  export SRUN_CPUS_PER_TASK=$cpus # srun does not take it from sbatch by itself
  echo "job $SLURM_JOB_ID, try ${SLURM_RESTART_COUNT:-0}: $SLURM_NNODES nodes x $processes processes," \
    "head $address:$port, $config"

  ((SLURM_NNODES == 1)) || labels=(--label) # which node said it
  # One task per node starts that node's processes. SLURM_NODEID must be read there, not here, so
  # that rank 0 is on the first node. When one node fails the others wait for it for ever:
  # --kill-on-bad-exit.
  # shellcheck disable=SC2016
  srun --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=60 "${labels[@]}" \
    bash -c 'exec "$0" -m unimoe_mcore.node "$@" --node="$SLURM_NODEID"' \
    "$python" "$config" --nodes="$SLURM_NNODES" --processes="$processes" --head="$address:$port"
}
