#!/bin/sh
# 1. Flower's SuperLink, the hub of the federation. It listens on the loopback only: its control API has no user
#    accounts, and whoever may call it can register sites and start runs. Of the accounts of this machine, only the one
#    that runs this script and root may. Where the system does not tell accounts apart, this does not start, unless
#    FEDSPAN_ANY_LOCAL_USER=1 lets all of them in. FEDSPAN_HEALTH_PORT=9464 serves a health page and metrics on that port
#    of the loopback. FEDSPAN_DATABASE=:flwr-in-memory: keeps Flower's messages in memory, for trials.
set -eu
cd "$(dirname "$0")"
. ./environment.sh
export FEDSPAN_SERVER_DIR="$PWD"
mkdir -p state runs
if [ -n "${FEDSPAN_HEALTH_PORT:-}" ]; then
    "$PYTHON" -m fedspan.flower.health "$PWD" --port "$FEDSPAN_HEALTH_PORT" --parent "$$" &
fi
exec "$PYTHON" -m fedspan.flower.superlink ${FEDSPAN_ANY_LOCAL_USER:+--any-local-user} \
    --ssl-ca-certfile "$PWD/ca.crt" --ssl-certfile "$PWD/server.crt" --ssl-keyfile "$PWD/server.key" \
    --enable-supernode-auth --disable-runtime-dependency-installation \
    --host 127.0.0.1 --port @SUPERLINK_PORT@ --database "${FEDSPAN_DATABASE:-$PWD/state/superlink.db}"
