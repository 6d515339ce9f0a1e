# shellcheck shell=sh
# Sourced by the other scripts. Flower keeps its files in this folder, installs nothing, sends no telemetry and does not
# check for updates; its older gRPC interfaces stay closed.
umask 077
export FLWR_HOME="$PWD/flwr"
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export RAY_USAGE_STATS_ENABLED=0
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL="${FLWR_SUPEREXEC_TASK_POLL_INTERVAL:-0.1}"
unset FLWR_INTERNAL_GRPC_CONTROL_API FLWR_INTERNAL_GRPC_FLEET_API
# The organisation's web proxy must not be used for connections within this machine.
export NO_PROXY="localhost,127.0.0.1${NO_PROXY:+,$NO_PROXY}"
export no_proxy="$NO_PROXY"
PYTHON="${PYTHON:-python}"
