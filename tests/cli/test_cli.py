"""The command: help, mistakes, a merge, methods and settings; in a process of its own where that is the point."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from command import COMMAND, assert_mistake, environment, fedspan, inside, settings
from safetensors.torch import load_file, save_file

from fedspan.cli.arguments import join_weights, parse_weights
from fedspan.cli.main import main
from fedspan.config import json_schema
from fedspan.methods import METHODS, create, options


@pytest.mark.parametrize(
    "command",
    ["run", "resume", "evaluate", "predict", "merge", "methods", "config", "plot", "report", "watch"],
)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = inside(capsys, command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(rf"Examples?:\n +fedspan {command}", done.stdout)


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",)])
def test_the_bare_command_is_its_help(args: tuple[str, ...]) -> None:
    done = fedspan(*args)
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("run", "resume", "merge", "methods"):
        assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE)


def test_version() -> None:
    done = fedspan("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"fedspan \d+\.\d+\.\d+\S*\n", done.stdout)


def test_methods_as_json_says_what_the_methods_say(capsys: pytest.CaptureFixture[str]) -> None:
    done = inside(capsys, "methods", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    listed = {entry["name"]: entry for entry in json.loads(done.stdout)}
    assert list(listed) == list(METHODS)
    for name, entry in listed.items():
        method = create(name)
        for tag in ("exact", "gauge_invariant", "hetero_rank", "personalised", "paper", "traffic_up"):
            assert entry[tag] == getattr(method.info, tag)
        assert entry["secure_sum"] == method.secure_sum


def test_a_methods_options_are_listed_with_defaults_and_meanings(capsys: pytest.CaptureFixture[str]) -> None:
    done = inside(capsys, "methods", "glora")
    assert (done.returncode, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    for option in options("glora"):
        default = "none" if option.default is None else option.default
        assert re.search(rf"^{option.name} .* {re.escape(str(default))} ", done.stdout, re.MULTILINE)
        assert option.meaning.split(";")[0].split(":")[0][:30] in text
    record = json.loads(inside(capsys, "methods", "glora", "--json").stdout)
    assert [option["name"] for option in record["options"]] == [option.name for option in options("glora")]
    assert record["exact"] is True
    assert "fedit has no options" in inside(capsys, "methods", "fedit").stdout
    assert_mistake(inside(capsys, "methods", "glor"), "unknown method 'glor'", "did you mean 'glora'?")


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    done = inside(capsys, "config", "--schema")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json_schema()


HELP = [
    *[(), ("run",), ("resume",), ("merge",), ("methods",), ("config",), ("plot",), ("inspect",), ("bench",)],
    *[("evaluate",), ("predict",), ("report",), ("watch",)],
    *[("flower",), ("flower", "init"), ("flower", "up"), ("flower", "keys"), ("flower", "keys", "rotate")],
    *[("flower", "status"), ("flower", "health"), ("log",), ("log", "verify"), ("log", "show")],
]


@pytest.mark.parametrize("command", HELP)
def test_help_pages_are_the_same_with_every_typer(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Option names as written, every argument and option explained, no escapes."""
    done = inside(capsys, *command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\" not in done.stdout
    assert not re.search(r"--[a-z-]*[A-Z]", done.stdout)
    assert done.stdout.count("rguments:\n") <= 1
    assert max(map(len, done.stdout.splitlines())) <= 80
    entries = re.split(r"\n  (?=\S)", re.split(r"^(?:Arguments|Options):$", done.stdout, flags=re.MULTILINE)[-1])
    arguments = re.search(r"^Arguments:\n((?:  .*\n)+)", done.stdout, re.MULTILINE)
    if arguments is not None:
        entries += re.split(r"\n  (?=\S)", arguments[1])
    for entry in filter(str.strip, entries):
        assert re.search(r"  +[a-zA-Z`]", entry.strip()), entry
    assert inside(capsys, *command[:-1], *command[-1:], "-h").stdout == done.stdout


def test_methods_as_a_table_has_one_line_each() -> None:
    """Even where the terminal has none of our letters."""
    done = fedspan("methods", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    first_words = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    assert [word for word in first_words if word in METHODS] == list(METHODS)


def test_config_prints_what_it_would_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = inside(capsys, "config", "--set", "federation.rounds=7")
    assert done.returncode == 0
    (tmp_path / "c.toml").write_text(done.stdout, encoding="utf-8")
    again = inside(capsys, "config", tmp_path / "c.toml")
    assert again.stdout == done.stdout
    assert "rounds = 7" in done.stdout


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["rnu"], ["unknown command 'rnu'", "did you mean 'run'?"]),
        (["merg", "a"], ["did you mean 'merge'?"]),
        (["run", "--otu", "x"], ["no such option", "--otu", "`fedspan run --help`"]),
        (["run", "a.toml", "b.toml"], ["unexpected extra argument", "b.toml"]),
        (["run", "none.toml"], ["none.toml", "No such file"]),
        (["resume"], ["missing argument 'DIR'"]),
        (["run", "--set", "federation.round=3"], ["'federation.round'", "did you mean 'federation.rounds'?"]),
        (["run", "--set", "federation.rounds"], ["expected key=value"]),
        (["run", "--set", "federation.rounds=none"], ["federation.rounds = 'none'"]),
        (["run", "--engine", "fast"], ["engine.name = 'fast'", "'cohort'"]),
        (["run", "--workers", "0"], ["engine.workers", "greater than or equal to 1"]),
        (["resume", "x", "--workers", "none"], ["'--workers'", "valid integer", "`fedspan resume --help`"]),
        (["merge", "a", "--method", "glora", "--out", "x", "--weights", "1,b"], ["'b'", "expected numbers"]),
        (["merge", "a", "--method", "glora", "--rank", "two", "--out", "x"], ["--rank 'two'", "whole number"]),
    ],
)
def test_a_typing_mistake_is_answered_in_one_line(
    args: list[str],
    parts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_mistake(inside(capsys, *args), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("items", "parts"),
    [
        (["method.name=glor"], ["unknown method 'glor'", "did you mean 'glora'?"]),
        (["method.name=glora", "method.server_rnk=4"], ["'method.server_rnk'", "did you mean 'server_rank'?"]),
        (["method.name=fedit"], ["fedit", "one rank for all clients"]),
        (["data.task=builtin:task"], ["data.task = 'builtin:task'", "builtin:tasks"]),
        (["federation.ranks=[2, 4]"], ["2 ranks for 8 clients"]),
    ],
)
def test_what_a_run_cannot_do_is_said_before_it_starts(
    items: list[str], parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_mistake(inside(capsys, "run", *settings(items), "--out", tmp_path / "out"), *parts)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_method_is_answered_by_the_command_too(tmp_path: Path) -> None:
    done = fedspan("run", "--set", "method.name=flor", "--out", tmp_path / "out")
    assert_mistake(done, "unknown method 'flor'", "did you mean 'flora'?")
    assert list(tmp_path.iterdir()) == []


def test_the_traceback_is_there_on_request() -> None:
    done = fedspan("run", "none.toml", FEDSPAN_DEBUG="1")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_a_closed_output_is_no_error() -> None:
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *COMMAND, "--version"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_stops_early_is_no_error() -> None:
    with subprocess.Popen(
        [*COMMAND, "methods", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


def test_resume_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_mistake(inside(capsys, "resume", tmp_path), str(tmp_path), "config.toml")


def write_adapter(folder: Path, seed: int, rank: int, alpha: float) -> torch.Tensor:
    """A PEFT folder of one layer, 12×10; its ΔW."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, 10, generator=generator), torch.randn(12, rank, generator=generator)
    prefix = "base_model.model.layer.q_proj"
    save_file({f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "base",
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return (alpha / rank) * b @ a


def test_merge_is_the_weighted_mean_of_the_updates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Different ranks, different scalings, in any order and spelling of the command line."""
    x = write_adapter(tmp_path / "x", 1, 2, 16)
    y = write_adapter(tmp_path / "y", 2, 4, 8)
    folders = [tmp_path / "x", tmp_path / "y"]
    spellings = {
        "ahead": ["--weights", "3", "1", *folders],
        "behind": [*folders, "--weights", "3", "1"],
        "commas": [*folders, "--weights", "3,1"],
        "repeated": ["--weights=3", "--weights=1", *folders],
    }
    for name, args in spellings.items():
        out = tmp_path / name
        arguments = ("merge", *args, "--method", "flora", "--out", out)
        done = inside(capsys, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert "No limit of the rank (--rank) was given" in done.stdout
        assert "With 4, the largest rank of the adapters, they would take" in done.stdout
        merged = load_file(out / "adapter_model.safetensors")
        config = json.loads((out / "adapter_config.json").read_text())
        a, b = (next(v for k, v in merged.items() if f"lora_{side}" in k) for side in "AB")
        delta = config["lora_alpha"] / config["r"] * b @ a
        torch.testing.assert_close(delta, 0.75 * x + 0.25 * y, rtol=1e-4, atol=1e-4)
        assert_mistake(inside(capsys, *arguments), str(out))


def test_merge_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(tmp_path / "x", 1, 2, 16)
    for args, part in (
        (["--method", "flor"], "did you mean 'flora'?"),
        (["--method", "glora", "--set", "server_rnk=3"], "did you mean 'server_rank'?"),
        (["--method", "glora", "--weights", "1", "2"], "2 weights"),
        (["--method", "glora", "--rank", "0"], "0"),
    ):
        assert_mistake(inside(capsys, "merge", tmp_path / "x", *args, "--out", tmp_path / "out"), part)
        assert not (tmp_path / "out").exists()
    done = inside(capsys, "merge", tmp_path / "none", "--method", "glora", "--out", tmp_path / "out")
    assert_mistake(done, str(tmp_path / "none"))


def test_weights_end_where_the_numbers_end() -> None:
    assert join_weights(["a", "--weights", "1", "2.5", "b", "--weights", "3"]) == [
        *["a", "--weights", "1,2.5", "b", "--weights", "3"]
    ]
    assert join_weights(["--weights", "1,", "2", "./3", "4"]) == ["--weights", "1,2", "./3", "4"]
    assert join_weights(["--weights", "--out", "1"]) == ["--weights", "--out", "1"]
    assert join_weights(["--", "--weights", "1", "2"]) == ["--", "--weights", "1", "2"]
    assert parse_weights(["1,2", "3e2"]) == [1.0, 2.0, 300.0]
    assert parse_weights([]) is None


def test_a_full_gpu_is_answered_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is torch's own; there is no GPU here to fill."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("fedspan.runs.execution.run", full)
    assert main(["run", "--out", str(tmp_path / "run")]) == 2
    assert re.fullmatch(r"fedspan: .*memory is full; try a smaller local\.batch_size.*\n", capsys.readouterr().err)
