"""The bare experiment: a plain PyTorch + PEFT loop, in one process or in forked ones. What every framework is above."""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import common
import measure


def _work(job: tuple[str, int, int, common.Adapter]) -> common.LocalResult:
    spec_path, client, round_num, adapter = job
    return common.trainer(spec_path).train(client, round_num, adapter)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--parallel", type=int, default=1, help="processes of one thread each")
    options = parser.parse_args()
    watch = measure.Watch()
    spec = common.Spec.read(options.spec)
    common.trainer(options.spec)  # before the fork: the workers share the base's pages
    adapter = common.initial_adapter(options.spec)
    log = measure.Log()
    pool = None
    if options.parallel > 1:
        pool = ProcessPoolExecutor(options.parallel, mp_context=multiprocessing.get_context("fork"))
    try:
        for round_num in range(1, spec.rounds + 1):
            jobs = [(options.spec, client, round_num, adapter) for client in spec.participants(round_num)]
            results = list((pool.map if pool else map)(_work, jobs))
            weights = [r.num_examples for r in results]
            adapter = common.weighted_average([r.adapter for r in results], weights)
            seconds = sum(r.seconds for r in results)
            log.add([r.train_loss for r in results], weights, [r.started for r in results], seconds)
    finally:
        if pool:
            pool.shutdown()
    measure.write_result(options.out, "plain", spec.rounds, log, adapter, watch, parallel=options.parallel)


if __name__ == "__main__":
    main()
