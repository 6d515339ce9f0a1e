#!/bin/sh
# 4. Starts or resumes the run runs/NAME (NAME is the first argument, by default "federation") and shows its log. The
#    exit status is 0 when it has a result. Ctrl-C ends this display only: the run goes on in the SuperLink.
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
name="${1:-federation}"
case "$name" in
*[!A-Za-z0-9._-]* | [.-]* | ?????????????????????????????????????????????????????????????????*)
    echo "run name $name: expected 64 letters, digits, dots, dashes and underscores at most, first no dot or dash" >&2
    exit 2
    ;;
esac
flwr run app fedspan --stream -c "run-name=\"$name\"" &
flwr=$!
trap '{ kill $flwr; wait $flwr; } 2>/dev/null || :; echo "the run $name goes on without this display" >&2; exit 143' HUP INT TERM
wait $flwr
# Flower's command ends with 0 however the run has ended.
if [ ! -f "runs/$name/summary.json" ]; then
    echo "the run $name has no result: the lines above say why, and \"run.sh $name\" continues it" >&2
    exit 1
fi
