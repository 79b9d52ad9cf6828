#!/bin/bash
# Installs what tests/slurm/ needs, as root on Debian or Ubuntu: a real Slurm (it is started by the
# tests themselves, never as a service) and shellcheck. Nothing if it is all there.
set -euo pipefail
missing=()
PATH=$PATH:/usr/sbin
for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge shellcheck:shellcheck; do
  command -v "${pair%%:*}" >/dev/null || missing+=("${pair#*:}")
done
((${#missing[@]} > 0)) || exit 0
if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
  echo "tests/slurm: ${missing[*]} must be installed by root (apt); without it these tests skip"
  exit 0
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
