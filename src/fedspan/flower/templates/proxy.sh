#!/bin/sh
# 2. The proxy, which gives sites access to the fleet API of the SuperLink and to nothing else. FEDSPAN_PROXY=python
#    uses the proxy that comes with fedspan, for servers without nginx.
set -eu
cd "$(dirname "$0")"
. ./environment.sh
mkdir -p state
case "${FEDSPAN_PROXY:-nginx}" in
nginx)
    exec nginx -p "$PWD" -e stderr -c "$PWD/nginx.conf" -g "daemon off; ${FEDSPAN_NGINX:-}"
    ;;
python)
    exec "$PYTHON" -m fedspan.flower.proxy @HOSTS@ --port @PORT@ --upstream 127.0.0.1:@SUPERLINK_PORT@ \
        --certificate server.crt --key server.key --ca ca.crt
    ;;
*)
    echo "FEDSPAN_PROXY=$FEDSPAN_PROXY: expected nginx or python" >&2
    exit 2
    ;;
esac
