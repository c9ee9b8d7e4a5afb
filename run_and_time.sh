#!/usr/bin/env bash
# One timed MLPerf run: clears the page cache, trains, and prints a RESULT line.
#
#   DATA_DIR=/data LOG_DIR=/results/run_0 NPROC_PER_NODE=8 ./run_and_time.sh SEED @recipes/kits19_8xgpu.args
#
# SEED: a different one for each run; -1 takes one from the operating system. Further arguments go to main.py.
# Variables: DATA_DIR (required), LOG_DIR (results), NPROC_PER_NODE (1), PYTHON (python3).
set -euo pipefail
cd "$(dirname "$0")"

seed=${1:?usage: DATA_DIR=… $0 SEED [main.py arguments]}
shift
data_dir=${DATA_DIR:?DATA_DIR is not set: the folder that preprocess_dataset.py wrote}
log_dir=${LOG_DIR:-results}
nproc=${NPROC_PER_NODE:-1}
python=${PYTHON:-python3}

# Needs root; without it the run goes on and its log records that the caches were not cleared.
if sync && { echo 3 >/proc/sys/vm/drop_caches; } 2>/dev/null; then
  export CACHES_WERE_CLEARED=1
  echo "page cache cleared"
else
  export CACHES_WERE_CLEARED=0
  echo "warning: the page cache could not be cleared (root may); a closed-division result needs it" >&2
fi

if [ "$nproc" -gt 1 ]; then
  launcher=("$python" -m torch.distributed.run --standalone --nproc_per_node "$nproc")
else
  launcher=("$python")
fi

start=$(date +%s)
echo "STARTING TIMING RUN AT $(date '+%Y-%m-%d %r')"
status=0
"${launcher[@]}" main.py --data_dir "$data_dir" --log_dir "$log_dir" --seed "$seed" "$@" || status=$?
end=$(date +%s)
echo "ENDING TIMING RUN AT $(date '+%Y-%m-%d %r')"
if [ "$status" -ne 0 ]; then
  echo "the run failed with exit status $status: no result" >&2
  exit "$status"
fi
# MLPerf's line: benchmark, seconds, when it started.
echo "RESULT,image_segmentation,$seed,$((end - start)),${USER:-$(id -un)},$(date -d "@$start" '+%Y-%m-%d %r')"
