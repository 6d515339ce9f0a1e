#!/bin/sh
# 4. Starts or resumes the run runs/NAME (NAME is the first argument, by default "federation") and shows its log.
set -eu
cd "$(dirname "$0")"
. ./environment.sh
mkdir -p "$FLWR_HOME"
cat >"$FLWR_HOME/config.toml" <<END
[superlink]
default = "fedspan"

[superlink.fedspan]
address = "localhost:@SUPERLINK_PORT@"
root-certificates = "$PWD/ca.crt"
END
name="${1:-federation}"
case "$name" in
*[!A-Za-z0-9._-]* | .*)
    echo "run name $name: expected letters, digits, dots, dashes and underscores, not beginning with a dot" >&2
    exit 2
    ;;
esac
exec flwr run app fedspan --stream -c "run-name=\"$name\""
