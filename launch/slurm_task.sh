#!/usr/bin/env bash
# One rank as a Slurm task: `srun launch/slurm_task.sh train.py recipe=...`, one task per GPU. launch/slurm.sbatch sets what it needs.
set -euo pipefail
: "${SLURM_PROCID:?start this with srun}" "${SLURM_NTASKS:?}" "${SLURM_LOCALID:?}"
export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID"
: "${MASTER_ADDR:?a node that all ranks reach}" "${MASTER_PORT:?a free port there}"
exec "${PYTHON:-python}" "$@"
