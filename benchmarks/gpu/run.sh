#!/usr/bin/env bash
# Check and time a GPU: benchmarks/gpu/run.sh [FILE.jsonl] [PART ...]. No network; a file that is there is completed.
set -u
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-gpu.jsonl}
shift || true
export PYTHONPATH="$here/../../src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# In processes of their own, so that one part that dies leaves the others.
for part in "${@:-server passes run parity profile}"; do
  for one in $part; do
    timeout 240 python3 "$here/measure.py" --out "$out" --part "$one" || echo "$one ended with $?"
  done
done
