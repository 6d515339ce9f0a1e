"""The experiment in Flower's simulation engine (Message API, Ray backend)."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
from pathlib import Path

os.environ.update(
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_memory_monitor_refresh_ms="0",  # no worker is killed for memory here, and nothing polls for it
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
)

import common
import measure


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--parallel", type=int, default=2, help="Ray actors of one CPU and one thread each")
    parser.add_argument("--pull-interval", type=float, default=0.005, help="seconds; 0.1 is Flower's own")
    options = parser.parse_args()
    watch = measure.Watch()

    import flower_app
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    spec_path = str(Path(options.spec).resolve())
    spec = common.Spec.read(spec_path)
    log, final = measure.Log(), {}
    # A short name: Ray's sockets lie in this folder, and a socket's path may have 107 characters only.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        init_args = {
            "num_cpus": options.parallel,
            "include_dashboard": False,
            "log_to_driver": False,
            "_temp_dir": folder,
        }
        run_simulation(
            server_app=flower_app.server(spec_path, log, final, options.pull_interval),
            client_app=flower_app.client_app,
            num_supernodes=spec.num_clients,
            backend_config={"init_args": init_args, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
        )
    more = {"parallel": options.parallel, "pull_interval": options.pull_interval}
    measure.write_result(options.out, "flower", spec.rounds, log, final, watch, **more)


if __name__ == "__main__":
    main()
