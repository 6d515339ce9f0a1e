"""Seeded bugs, each with the tests that must fail on it: `python tests/mutants/seeded.py [WORDS]` tries them.

A mutant replaces one piece of the source's text in a copy of the package and runs the named tests against the copy.
One that no test sees is alive, and the tests lack a law. `test_seeded.py` checks that every piece still stands in the
source once; the mutants themselves take minutes and are tried by `make test-mutants`. The bugs are in `bugs_in_*.py`.
"""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from bugs_in_algebra import ALGEBRA
from bugs_in_methods import METHODS
from bugs_in_privacy import PRIVACY
from bugs_in_training import TRAINING
from mutant import Mutant

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "fedspan"
_LIMIT = 900
"""Seconds after which tests are ended; a bug because of which a test never ends has been seen."""
MUTANTS = [*METHODS, *ALGEBRA, *TRAINING, *PRIVACY]


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


def run_tests(tests: Sequence[str], package: Path) -> int:
    """Return pytest's exit code of these tests against this copy of the package: 0, all pass; 1, one fails;
    that of the alarm, they do not end.

    In a forked process, which has the large libraries in memory already: importing them takes longer than most tests.
    """
    child = os.fork()
    if child == 0:
        signal.alarm(_LIMIT)
        os.environ["PYTHONPATH"] = str(package)
        sys.path.insert(0, str(package))
        os.chdir(ROOT)
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os._exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests])))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(words: Sequence[str]) -> int:
    """Try the mutants whose description has all these words; return how many are alive."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for library in ("torch", "transformers", "peft", "hypothesis", "scipy.stats"):
        importlib.import_module(library)
    chosen = [mutant for mutant in MUTANTS if all(word in mutant.what for word in words)]
    alive = 0
    for mutant, package in copies(chosen):
        code = run_tests(mutant.tests.split(), package)
        if code not in (0, 1, -signal.SIGALRM):
            # Tests that were not found, or could not be collected, have not seen the bug.
            raise SystemExit(f"{mutant.what}: pytest ended with {code}: expected 0 or 1")
        alive += code == 0
        sys.stdout.write(f"{'ALIVE' if code == 0 else 'dead '}  {mutant.what}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{len(chosen) - alive} of {len(chosen)} mutants are dead\n")
    return alive


if __name__ == "__main__":
    raise SystemExit(min(main(sys.argv[1:]), 1))
