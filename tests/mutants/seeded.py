"""Seeded bugs, each with the tests that must fail on it: `python tests/mutants/seeded.py [WORDS]` tries them.

A mutant replaces one piece of the source's text in a copy of the package and runs the named tests against the copy.
One that no test sees is alive, and the tests lack a law. `test_seeded.py` checks that every piece still stands in the
source once; the mutants themselves take minutes and are tried by `make test-mutants`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "fedspan"


@dataclass(frozen=True)
class Mutant:
    """One bug."""

    what: str
    file: str
    """Under `src/fedspan`."""
    piece: str
    """Stands in the file once."""
    bug: str
    """Stands in its place."""
    tests: str
    """Arguments of pytest."""


MUTANTS = [
    Mutant(
        "HetLoRA: the rank to prune to is rounded",
        "methods/hetlora.py",
        "max(1, int(gamma * rank))",
        "max(1, round(gamma * rank))",
        "tests/methods/test_factor_rules.py",
    ),
    Mutant(
        "HetLoRA: a client counts by its norm before pruning",
        "methods/hetlora.py",
        "size = sum(lowrank.norm(f.delta()) ** 2 for f in factors.values()) ** 0.5",
        "size = sum(lowrank.norm(update.factors(n).delta()) ** 2 for n in factors) ** 0.5",
        "tests/methods/test_factor_rules.py",
    ),
    Mutant(
        "HetLoRA: nothing is pruned at the default gamma",
        "methods/hetlora.py",
        "if tail < rank and _tail_norm",
        "if gamma < 0.99 and tail < rank and _tail_norm",
        "tests/methods/test_factor_rules.py",
    ),
    Mutant(
        "HetLoRA: the tail's norm is not in the loss",
        "client/training.py",
        "loss = loss + strength * model.tail_penalty(tail)",
        "loss = loss + 0 * strength * model.tail_penalty(tail)",
        "tests/client/test_training.py",
    ),
    Mutant(
        "HetLoRA: the tail's norm has no A",
        "methods/hetlora.py",
        "f.b[:, tail:].norm() * f.a[tail:].norm()",
        "f.b[:, tail:].norm()",
        "tests/methods/test_factor_rules.py",
    ),
    Mutant(
        "a round's gradient is the sum over its batches, not the mean",
        "client/training.py",
        "torch.autograd.backward(loss / steps)",
        "torch.autograd.backward(loss)",
        "tests/client/test_local_rules.py",
    ),
    Mutant(
        "the gradient's loss is the sum over its batches",
        "client/training.py",
        "LocalResult(update, float(total) / steps, steps)",
        "LocalResult(update, float(total), steps)",
        "tests/client/test_local_rules.py",
    ),
    Mutant(
        "gradients are clipped before the proximal term",
        "client/training.py",
        "                    p.grad.add_(p - self.start[name], alpha=self.mu)",
        "                    p.grad.mul_(min(1.0, 1.0 / float(p.grad.norm() + 1e-6)))\n"
        "                    p.grad.add_(p - self.start[name], alpha=self.mu)",
        "tests/client/test_local_rules.py",
    ),
    Mutant(
        "noise of example-level privacy is not keyed by the sum",
        "privacy/example_dp.py",
        'fingerprint([("sum", total), ("weights", weights.detach())])',
        'fingerprint([("weights", weights.detach())])',
        "tests/privacy/test_dp_ledgers.py tests/privacy/test_example_dp.py tests/privacy/test_dp_attacks.py",
    ),
    Mutant(
        "noise of example-level privacy is not keyed by z and C",
        "privacy/example_dp.py",
        '"noise", mark, z, clip, expected, about',
        '"noise", mark, expected, about',
        "tests/privacy/test_dp_ledgers.py tests/privacy/test_example_dp.py",
    ),
    Mutant(
        "GLoRA: an innovation server lets clients name as many directions as they like",
        "methods/glora.py",
        'vote = None if options.update == "replace" else rank',
        "vote = None",
        "tests/methods/test_glora.py",
    ),
    Mutant(
        "a readout's spare rows are the same in every round",
        "methods/readout.py",
        "fresh = fresh_a(template, module, rank, round_num).to(a)",
        "fresh = fresh_a(template, module, rank).to(a)",
        "tests/methods/test_glora.py",
    ),
    Mutant(
        "a column space is taken for full where rounding may have made it so",
        "algebra/subspace.py",
        "safe = (worst_b < limit) & (worst_a < limit) & (certain > rounding)",
        "safe = (worst_b < limit) & (worst_a < limit)",
        "tests/algebra/test_subspace.py",
    ),
    Mutant(
        "the Nyström step is in float32",
        "methods/spectral.py",
        "h = (x.mT @ y).double()",
        "h = x.mT @ y",
        "tests/methods/test_spectral.py tests/methods/test_glora_sums.py tests/methods/test_ties.py",
    ),
    Mutant(
        "FedProx pulls towards 0",
        "client/training.py",
        "p.grad.add_(p - self.start[name], alpha=self.mu)",
        "p.grad.add_(p, alpha=self.mu)",
        "tests/client/test_local_rules.py",
    ),
    Mutant(
        "SCAFFOLD's correction is clipped with the gradients",
        "client/training.py",
        "            trained.gradients()\n            if local.clip_norm is not None:",
        "            trained.gradients()\n            trained.correct()\n            if local.clip_norm is not None:",
        "tests/client/test_local_rules.py tests/methods/test_client_rules.py",
    ),
    Mutant(
        "warm-up starts at rate 0",
        "client/training.py",
        "min(1.0, (step + 1) / warmup)",
        "min(1.0, step / warmup)",
        "tests/client/test_training.py",
    ),
    Mutant(
        "batches repeat examples within a pass",
        "client/training.py",
        "        order = order[size:]",
        "        order = order[size - 1 :] if size > 1 else order[size:]",
        "tests/client/test_training.py",
    ),
    Mutant(
        "clipping of examples is off by the margin's square root",
        "privacy/example_dp.py",
        "(clip * _MARGIN / norms.clamp_min(1e-300)).clamp_max(1.0)",
        "(clip * 1.001 / norms.clamp_min(1e-300)).clamp_max(1.0)",
        "tests/privacy/test_example_dp.py",
    ),
    Mutant(
        "client-level privacy divides by the number that took part",
        "privacy/client_dp.py",
        "/ self.expected for key in total}",
        "/ max(partial.num_clients, 1) for key in total}",
        "tests/privacy/test_client_dp.py",
    ),
    Mutant(
        "a threshold of half the clients unmasks a sum",
        "privacy/roster.py",
        "or 2 * threshold <= num_clients",
        "or 2 * threshold < num_clients",
        "tests/privacy/test_secure_sum.py",
    ),
    Mutant(
        "the digest of a sum leaves out the rank of its layout",
        "privacy/sum_layout.py",
        "numbers = [self.round_num, self.number, self.server_rank, self.num_clients, self.rank]",
        "numbers = [self.round_num, self.number, self.server_rank, self.num_clients]",
        "tests/server/test_lying_server.py",
    ),
    Mutant(
        "a second list of survivors is unmasked after a restart",
        "site/storage.py",
        '<= chosen <= set(before["survivors"]):',
        "<= set(range(0)) | chosen:",
        "tests/server/test_lying_server.py",
    ),
    Mutant(
        "an answer of an earlier round counts",
        "server/requests.py",
        '"round": question.round_num, "number"',
        '"number"',
        "tests/server/test_hostile_sites.py",
    ),
    Mutant(
        "joint noise of one draw adds as if the draws were others",
        "privacy/releases.py",
        "return given[0] / math.sqrt(len(given))",
        "return given[0]",
        "tests/privacy/test_dp_ledgers.py",
    ),
]


def copies(mutants: Sequence[Mutant]) -> Iterator[tuple[Mutant, Path]]:
    """Yield every mutant with a copy of the package that has its bug."""
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "fedspan"
        shutil.copytree(SOURCE, package)
        for mutant in mutants:
            path = package / mutant.file
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(mutant.piece, mutant.bug), encoding="utf-8")
            yield mutant, Path(folder)
            path.write_text(text, encoding="utf-8")


def is_alive(mutant: Mutant, package: Path) -> bool:
    """Return whether the tests pass with the bug."""
    environment = {**os.environ, "PYTHONPATH": str(package), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant.tests.split()]
    return subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=False).returncode == 0


def main(words: Sequence[str]) -> int:
    """Try the mutants whose description has all these words; return how many are alive."""
    chosen = [mutant for mutant in MUTANTS if all(word in mutant.what for word in words)]
    alive = 0
    for mutant, package in copies(chosen):
        survived = is_alive(mutant, package)
        alive += survived
        sys.stdout.write(f"{'ALIVE' if survived else 'dead '}  {mutant.what}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{len(chosen) - alive} of {len(chosen)} mutants are dead\n")
    return alive


if __name__ == "__main__":
    raise SystemExit(min(main(sys.argv[1:]), 1))
