"""The experiment in NVFlare's simulator."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import common
import measure
import numpy as np

HERE = Path(__file__).resolve().parent
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--parallel", type=int, default=2, help="clients at work at a time (with --api collab)")
    parser.add_argument("--sites", type=int, help="processes; by default one per client, as NVFlare is meant")
    parser.add_argument("--api", choices=("collab", "fedavg"), default="collab")
    parser.add_argument("--threads", type=int, help="of the simulator, with --api fedavg; by default one per client")
    parser.add_argument("--poll", type=float, default=0.05, help="seconds between looks for a task or a result")
    options = parser.parse_args()
    watch = measure.Watch()
    spec_path = str(Path(options.spec).resolve())
    out = str(Path(options.out).resolve())
    spec = common.Spec.read(spec_path)
    sites = options.sites or spec.num_clients
    if sites != spec.num_clients and (options.api == "fedavg" or sites != options.parallel):
        raise ValueError(f"--sites {sites}: expected {spec.num_clients}, or as many as --parallel with --api collab")
    if options.api == "fedavg":
        if spec.participation < 1.0:
            raise ValueError(f"participation = {spec.participation}; expected 1.0 with --api fedavg")
        options.parallel = options.threads or sites
    elif options.threads:
        raise ValueError(f"--threads {options.threads}: expected it with --api fedavg only: calls need live processes")
    with tempfile.TemporaryDirectory(prefix="nvflare-peer-") as workspace:
        result = str(Path(workspace, "result.json"))
        run = _collab if options.api == "collab" else _fedavg
        run(spec, spec_path, result, workspace, sites, options)
        if not Path(result).exists():
            raise RuntimeError("NVFlare's server did not complete its rounds: see what it logged above")
        held = json.loads(Path(result).read_text(encoding="utf-8"))
        with np.load(result + ".npz") as arrays:
            adapter = {name: arrays[name] for name in arrays.files}
    log = measure.Log(held["ends"], held["losses"], held["first_step"], held["client_seconds"])
    more = {"api": options.api, "parallel": options.parallel, "sites": sites}
    measure.write_result(out, "nvflare", spec.rounds, log, adapter, watch, **more)


def _collab(
    spec: common.Spec, spec_path: str, result: str, workspace: str, sites: int, options: argparse.Namespace
) -> None:
    import nvflare_app
    from nvflare.collab import CollabRecipe
    from nvflare.recipe import SimEnv

    recipe = CollabRecipe(
        job_name="peer",
        server=nvflare_app.Server(spec_path, options.parallel, result),
        client=nvflare_app.Client(spec_path),
        sync_task_timeout=600,
        min_clients=sites,
    )
    recipe.add_server_config({"server": {"task_request_interval": options.poll}})
    recipe.execute(SimEnv(num_clients=sites, num_threads=sites, workspace_root=workspace, log_config="ERROR"))


def _fedavg(
    spec: common.Spec, spec_path: str, result: str, workspace: str, sites: int, options: argparse.Namespace
) -> None:
    import nvflare_classic
    from nvflare.client.config import ExchangeFormat
    from nvflare.job_config.api import FedJob
    from nvflare.job_config.script_runner import FrameworkType, ScriptRunner

    job = FedJob(name="peer", min_clients=sites)
    job.to_server(nvflare_classic.LoggedFedAvg(spec_path, result, sites, spec.rounds, options.poll))
    job.to_server({"server": {"task_request_interval": options.poll}})
    script = ScriptRunner(
        script=str(HERE / "nvflare_client.py"),
        script_args=spec_path,
        framework=FrameworkType.NUMPY,
        server_expected_format=ExchangeFormat.NUMPY,
    )
    job.to_clients(script)
    job.simulator_run(workspace, n_clients=sites, threads=options.parallel, log_config="ERROR")


if __name__ == "__main__":
    main()
