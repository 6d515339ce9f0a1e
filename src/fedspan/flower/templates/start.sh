#!/bin/sh
# Starts this site: Flower's SuperNode, which fetches its messages from the server (nobody can connect to it from
# outside), and the executor, which hands them to the process that holds the model and the data. Both end together;
# a service manager may start the site again after a minute.
set -eu
cd "$(dirname "$0")"
. ./environment.sh
node= executor=
trap 'trap - EXIT; kill $node $executor 2>/dev/null || :; wait' EXIT
trap 'exit 143' HUP INT TERM
"$PYTHON" -m fedspan.flower.node \
    --superlink "${FEDSPAN_SERVER:-@SERVER@}" --root-certificates "$PWD/ca.crt" \
    --auth-supernode-private-key "$PWD/node.key" --isolation process --host 127.0.0.1 --port @RUNTIME_PORT@ \
    --superexec-auth-secret-file "$PWD/runtime.key" &
node=$!
"$PYTHON" -m fedspan.flower.client_app_process --runtime-api-address 127.0.0.1:@RUNTIME_PORT@ --site "$PWD" \
    --superexec-auth-secret-file "$PWD/runtime.key" &
executor=$!
while kill -0 "$node" 2>/dev/null && kill -0 "$executor" 2>/dev/null; do
    sleep 1 &
    wait $!
done
echo "the site @CLIENT_ID@ ends: its SuperNode or its executor ended" >&2
exit 1
