#!/bin/sh
# 3. Registers the sites whose public keys are in nodes/, and unregisters all others.
set -eu
cd "$(dirname "$0")"
. ./environment.sh
exec "$PYTHON" -m fedspan.flower.node_keys --superlink 127.0.0.1:@SUPERLINK_PORT@ --ca ca.crt nodes
