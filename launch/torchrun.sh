#!/usr/bin/env bash
# Starts train.py with torchrun: on this machine, or as one of several.
#
#   launch/torchrun.sh recipe=deepseek_vl_1b/align ...                     one machine
#   NNODES=16 HEAD=node01 launch/torchrun.sh recipe=... ...                the same on each of 16, node01 among them
#   dsvl chain deepseek_vl_1b --launcher launch/torchrun.sh ...            all stages
#
# NPROC_PER_NODE  ranks of each machine (its GPUs; without any, its cores)
# NNODES, HEAD    machines, and the one of them that the others meet at (1, none)
# PORT, RUN_ID    where and under which name they meet; a name for each run that shares a HEAD at the same time (29400, dsvl)
# MAX_RESTARTS    times that all ranks start anew after a failure, from the latest checkpoint (0)
# LOCAL_ADDR      this machine's address, where its name does not resolve
# PYTHON          (.venv/bin/python of this folder if it is there, else python)
set -euo pipefail
home="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python
    [ ! -x "$home/.venv/bin/python" ] || PYTHON="$home/.venv/bin/python"
fi
options=(--nnodes "${NNODES:-1}" --nproc-per-node "${NPROC_PER_NODE:-auto}" --max-restarts "${MAX_RESTARTS:-0}")
if [ "${NNODES:-1}" = 1 ]; then
    options+=(--standalone)
else
    : "${HEAD:?NNODES=$NNODES machines meet at HEAD: set it to the name of one of them}"
    options+=(--rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29400}" --rdzv-id "${RUN_ID:-dsvl}")
fi
[ -z "${LOCAL_ADDR:-}" ] || options+=(--local-addr "$LOCAL_ADDR")

export PYTHONPATH="$home${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Kernels start in the order in which they are queued, so that tensor parallelism's messages overlap with computation (Megatron asks for it).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# A job manager's signal to stop goes to every process. It is for the ranks, which save; torchrun itself would die of it.
trap '' USR1 USR2
exec "$PYTHON" -m torch.distributed.run "${options[@]}" "$home/train.py" "$@"
