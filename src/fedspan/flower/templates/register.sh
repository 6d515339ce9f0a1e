#!/bin/sh
# 3. Makes the registered sites those whose public keys are in nodes/: new ones are added, others are shut out.
set -eu
cd "$(dirname "$0")"
. ./environment.sh
exec "$PYTHON" -m fedspan.flower.node_keys --superlink localhost:@SUPERLINK_PORT@ --ca ca.crt nodes
