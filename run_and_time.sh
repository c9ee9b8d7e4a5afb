#!/usr/bin/env bash
# One timed MLPerf run: clears the page cache, trains, and prints a RESULT line.
#
#   DATA_DIR=/data LOG_DIR=/results/run_0 NPROC_PER_NODE=8 ./run_and_time.sh SEED @recipes/kits19_8xgpu.args
#
# SEED: -1, which a closed-division run needs, draws one from the operating system; any other makes the run repeatable,
# and open. Further arguments go to main.py. Paths are relative to the current folder.
# Variables: DATA_DIR (required), LOG_DIR (results), NPROC_PER_NODE (1), PYTHON (python3).
set -euo pipefail
project=$(cd "$(dirname "$0")" && pwd)

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
"${launcher[@]}" "$project/main.py" --data_dir "$data_dir" --log_dir "$log_dir" --seed "$seed" "$@" &
run=$!
# docker stop and schedulers signal this script alone; the run saves its state and ends.
trap 'kill -TERM "$run"' TERM INT
status=0
wait "$run" || status=$?
while kill -0 "$run" 2>/dev/null; do # a signal ended `wait`, not the run
  status=0
  wait "$run" || status=$?
done
end=$(date +%s)
echo "ENDING TIMING RUN AT $(date '+%Y-%m-%d %r')"
if [ "$status" -ne 0 ]; then
  echo "the run failed with exit status $status: no result" >&2
  exit "$status"
fi
if ! grep -q '"key": "run_stop".*"status": "success"' "$log_dir/unet3d.log"; then
  echo "the run ended below its target: no result" >&2
  exit 0
fi
# MLPerf's line: benchmark, seed, seconds, user, when it started.
seed=$(sed -n 's/.*"key": "seed", "value": \([0-9]*\).*/\1/p' "$log_dir/unet3d.log" | tail -1)
echo "RESULT,image_segmentation,$seed,$((end - start)),${USER:-$(id -un)},$(date -d "@$start" '+%Y-%m-%d %r')"
