#!/bin/sh
# 4. Starts the server of this region (NAME is the first argument, by default "region": its log is in runs/NAME) and
#    shows its log. It serves until the SuperLink ends, and needs no second start for another run of the server above.
#    Ctrl-C ends this display only.
set -eu
cd "$(dirname "$0")"
. ./environment.sh
mkdir -p "$FLWR_HOME"
cat >"$FLWR_HOME/config.toml" <<END
[superlink]
default = "fedspan"

[superlink.fedspan]
address = "127.0.0.1:@SUPERLINK_PORT@"
root-certificates = "$PWD/ca.crt"
END
name="${1:-region}"
case "$name" in
*[!A-Za-z0-9._-]* | [.-]* | ?????????????????????????????????????????????????????????????????*)
    echo "run name $name: expected 64 letters, digits, dots, dashes and underscores at most, first no dot or dash" >&2
    exit 2
    ;;
esac
exec flwr run app fedspan --stream -c "run-name=\"$name\""
