#!/bin/sh
# 4. Starts or resumes the run runs/NAME (NAME is the first argument, by default "federation") and shows its log. The
#    exit status is 0 when it has a result. Ctrl-C ends this display only: the run goes on in the SuperLink.
set -eu
cd "$(dirname "$0")"
. ./environment.sh
RUN_NAME="${1:-federation}"
. ./flwr_command.sh
flwr run app fedspan --stream -c "run-name=\"$RUN_NAME\"" &
flwr=$!
trap '{ kill $flwr; wait $flwr; } 2>/dev/null || :; echo "the run $RUN_NAME goes on without this display" >&2; exit 143' HUP INT TERM
wait $flwr
# Flower's command ends with 0 however the run has ended.
if [ ! -f "runs/$RUN_NAME/summary.json" ]; then
    echo "the run $RUN_NAME has no result: the lines above say why, and \"run.sh $RUN_NAME\" continues it" >&2
    exit 1
fi
