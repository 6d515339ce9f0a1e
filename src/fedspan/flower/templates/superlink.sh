#!/bin/sh
# 1. Flower's SuperLink, the hub of the federation. It listens on the loopback only: its control API has no user
#    accounts, and anyone who reaches it can register sites and start runs.
set -eu
cd "$(dirname "$0")"
. ./environment.sh
export FEDSPAN_SERVER_DIR="$PWD"
mkdir -p state runs
exec flower-superlink \
    --ssl-ca-certfile "$PWD/ca.crt" --ssl-certfile "$PWD/server.crt" --ssl-keyfile "$PWD/server.key" \
    --enable-supernode-auth --disable-runtime-dependency-installation \
    --host 127.0.0.1 --port @SUPERLINK_PORT@ --database "$PWD/state/superlink.db"
