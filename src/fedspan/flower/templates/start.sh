#!/bin/sh
# Starts this site: Flower's SuperNode, which fetches messages from the server (it accepts no connections from outside),
# and the ClientApp process, which passes them to the worker that holds the model and the data. When one of them ends,
# so does the other; a service manager may restart the site after a minute. Other accounts of this machine cannot use
# the port between the two; where the system does not tell accounts apart, FEDSPAN_ANY_LOCAL_USER=1 lets all of them in.
# FEDSPAN_HEALTH_PORT=9464 serves a health page and metrics on that port of the loopback.
set -eu
cd "$(dirname "$0")"
. ./environment.sh
node='' client_app='' health=''
trap 'trap - EXIT; kill $node $client_app $health 2>/dev/null || :; wait' EXIT
trap 'exit 143' HUP INT TERM
"$PYTHON" -m fedspan.flower.node ${FEDSPAN_ANY_LOCAL_USER:+--any-local-user} \
    --superlink "${FEDSPAN_SERVER:-@SERVER@}" --root-certificates "$PWD/ca.crt" \
    --auth-supernode-private-key "$PWD/node.key" --isolation process --host 127.0.0.1 --port @RUNTIME_PORT@ \
    --superexec-auth-secret-file "$PWD/runtime.key" &
node=$!
"$PYTHON" -m fedspan.flower.client_app_process --runtime-api-address 127.0.0.1:@RUNTIME_PORT@ --site "$PWD" \
    --superexec-auth-secret-file "$PWD/runtime.key" &
client_app=$!
if [ -n "${FEDSPAN_HEALTH_PORT:-}" ]; then
    "$PYTHON" -m fedspan.flower.health "$PWD" --port "$FEDSPAN_HEALTH_PORT" --parent "$$" &
    health=$!
fi
while kill -0 "$node" 2>/dev/null && kill -0 "$client_app" 2>/dev/null; do
    sleep 1 &
    wait $!
done
echo "the site @CLIENT_ID@ ends: its SuperNode or its ClientApp process has ended" >&2
exit 1
