#!/bin/sh
# 4. Starts the server of this region (NAME is the first argument, by default "region": its log is in runs/NAME) and
#    shows its log. It serves until the SuperLink ends, and needs no second start for another run of the server above.
#    Ctrl-C ends this display only.
set -eu
cd "$(dirname "$0")"
. ./environment.sh
RUN_NAME="${1:-region}"
. ./flwr_command.sh
exec flwr run app fedspan --stream -c "run-name=\"$RUN_NAME\""
