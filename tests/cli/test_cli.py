"""The command in real processes: help, mistakes, a whole run, a killed and resumed run, a merge."""

import io
import json
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from command import COMMAND, SMALL, assert_mistake, environment, fedspan, inside, settings
from interrupts import interruptible_children
from rich.console import Console
from safetensors.torch import load_file, save_file

from fedspan.cli.arguments import join_weights, parse_weights
from fedspan.cli.main import main
from fedspan.config import json_schema
from fedspan.display.progress import Live, Progression, duration, follow, number, size
from fedspan.methods import METHODS, create, options
from fedspan.runs.events import Event

TIMING = ("server_seconds", "client_seconds", "train_wall_seconds", "peak_server_bytes")


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def without_timing(value: Any) -> Any:
    if isinstance(value, dict):
        drop = (*TIMING, "wall_seconds")
        return {key: without_timing(item) for key, item in value.items() if key not in drop}
    return [without_timing(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("command", ["run", "resume", "merge", "methods", "config", "plot"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = fedspan(command, "--help")
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


def test_methods_as_json_says_what_the_methods_say() -> None:
    done = fedspan("methods", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    listed = {entry["name"]: entry for entry in json.loads(done.stdout)}
    assert list(listed) == list(METHODS)
    for name, entry in listed.items():
        method = create(name)
        for tag in ("exact", "gauge_invariant", "hetero_rank", "personalised", "paper", "traffic_up"):
            assert entry[tag] == getattr(method.info, tag)
        assert entry["secure_sum"] == method.secure_sum


def test_a_methods_options_are_listed_with_defaults_and_meanings() -> None:
    done = fedspan("methods", "glora")
    assert (done.returncode, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    for option in options("glora"):
        default = "none" if option.default is None else option.default
        assert re.search(rf"^{option.name} .* {re.escape(str(default))} ", done.stdout, re.MULTILINE)
        assert option.meaning.split(";")[0].split(":")[0][:30] in text
    record = json.loads(fedspan("methods", "glora", "--json").stdout)
    assert [option["name"] for option in record["options"]] == [option.name for option in options("glora")]
    assert record["exact"] is True
    assert "fedit has no options" in fedspan("methods", "fedit").stdout
    assert_mistake(fedspan("methods", "glor"), "unknown method 'glor'", "did you mean 'glora'?")


def test_the_schema_is_printed() -> None:
    done = fedspan("config", "--schema")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json_schema()


HELP = [(), ("run",), ("resume",), ("merge",), ("methods",), ("config",), ("plot",), ("inspect",), ("bench",)]
HELP += [("flower",), ("flower", "init"), ("flower", "up"), ("flower", "keys")]


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


def test_config_prints_what_it_would_read(tmp_path: Path) -> None:
    done = fedspan("config", "--set", "federation.rounds=7")
    assert done.returncode == 0
    (tmp_path / "c.toml").write_text(done.stdout, encoding="utf-8")
    again = fedspan("config", tmp_path / "c.toml")
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
def test_a_typing_mistake_is_answered_in_one_line(args: list[str], parts: list[str], tmp_path: Path) -> None:
    assert_mistake(fedspan(*args, cwd=tmp_path), *parts)
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One uninterrupted run, its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, fedspan("run", *settings(SMALL), "--out", folder)


def test_a_run_prints_plain_lines_and_a_table(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = finished
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert re.search(r"^(cohort|sequential) engine.*, \d+ process(es)?$", done.stdout, re.MULTILINE)
    rounds = [line for line in done.stdout.splitlines() if line.startswith("  round ")]
    assert [line.split()[1] for line in rounds] == ["1/3", "2/3", "3/3"] * 2
    assert all("loss" in line and "clients" in line for line in rounds)
    summary = json.loads((folder / "summary.json").read_text())
    for label, key in (("untouched base", "base"), ("average client alone", "local"), ("federation", "federated")):
        row = next(line for line in done.stdout.splitlines() if re.match(rf"{label} (\(|  )", line))
        assert number(summary[key]) in row
    assert size(summary["totals"]["bytes_up"]) in done.stdout
    assert str(folder / "adapter") in done.stdout


def test_a_run_leaves_a_whole_folder(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = finished
    assert {path.name for path in folder.iterdir()} == {
        "config.toml",
        "metrics.jsonl",
        "summary.json",
        "checkpoint",
        "adapter",
    }
    history = records(folder)
    assert [record["round_num"] for record in history] == [1, 2, 3]
    for record in history:
        assert record["num_clients"] == 2
        assert record["bytes_up"] > 0
        assert record["bytes_down"] > 0
        assert {"method", "train_loss", "eval", "server_rank", "truncation_error", *TIMING} <= set(record)
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("method", "metric", "higher_is_better", "base", "local", "federated", "seed", "versions"):
        assert key in summary
    assert summary["totals"]["bytes_up"] == sum(record["bytes_up"] for record in history)
    assert (folder / "adapter" / "adapter_config.json").exists()
    resolved = fedspan("config", folder / "config.toml")
    assert resolved.stdout == (folder / "config.toml").read_text(encoding="utf-8")


def test_a_folder_that_holds_a_run_is_refused(
    finished: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert_mistake(inside(capsys, "run", "--out", folder), str(folder), "fedspan resume")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_resume_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_mistake(inside(capsys, "resume", tmp_path), str(tmp_path), "config.toml")


def stop(args: Sequence[object], line: str, how: signal.Signals) -> tuple[int, str]:
    """Send the signal as soon as a line of the command's output starts so; its exit code and stderr."""
    with interruptible_children():
        process = subprocess.Popen(
            [*COMMAND, *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
            text=True,
        )
    with process:
        assert process.stdout is not None
        for printed in process.stdout:
            if printed.strip().startswith(line):
                process.send_signal(how)
                break
        _, errors = process.communicate(timeout=120)
        return process.returncode, errors


def test_a_run_stopped_twice_ends_with_the_same_bits(
    finished: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Killed in the federation, then interrupted in the control: as if nothing had happened."""
    whole, _ = finished
    folder = tmp_path / "stopped"
    code, _ = stop(["run", *settings(SMALL), "--out", folder], "round 2/3", signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert 2 <= len(records(folder)) <= 3
    code, errors = stop(["resume", folder], "clients alone", signal.SIGINT)
    assert (code, errors) == (130, f"fedspan: interrupted; continue with: fedspan resume {folder}\n")
    assert not (folder / "summary.json").exists()
    done = fedspan("resume", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "round" not in done.stdout.partition("clients alone")[0].partition("federation")[2]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "adapter" / name).read_bytes() == (whole / "adapter" / name).read_bytes()
    assert without_timing(records(folder)) == without_timing(records(whole))
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (folder, whole))
    assert without_timing(ours) == without_timing(theirs)


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
        done = fedspan(*arguments) if name == "ahead" else inside(capsys, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
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


def test_plot_draws_a_run(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    folder, _ = finished
    done = inside(capsys, "plot", folder, "--out", tmp_path / "curves.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert_mistake(inside(capsys, "plot", tmp_path), "metrics.jsonl")


def test_time_left_is_the_pace_so_far() -> None:
    at = Progression()
    at.begin("federation", total=10, done=4, now=100.0)  # resumed at round 4
    assert at.seconds_left(105.0) is None
    at.done = 6
    assert at.seconds_left(120.0) == pytest.approx(40.0)


def test_figures_are_short() -> None:
    assert [size(n) for n in (0, 999, 1000, 1_096_704, 2.5e9)] == ["0 B", "999 B", "1.0 kB", "1.1 MB", "2.5 GB"]
    assert [duration(s) for s in (0.4, 59.4, 60, 3725)] == ["0 s", "59 s", "1 min 00 s", "1 h 02 min"]
    assert [number(x) for x in (None, 0.12345, -0.5, 123456.0)] == ["–", "0.123", "-0.500", "1.235e+05"]


def show(console: Console) -> str:
    """Two rounds of two clients on a console; everything it was sent."""
    record = {"train_loss": 1.5, "num_clients": 2, "bytes_up": 10, "bytes_down": 20, "rejected": {}}
    ranks = {"num_clients": 2, "ranks": [2, 4], "rounds": 2}
    sizes = {"base_parameters": 1000, "trained_parameters": 100}
    how = {"engine": "sequential", "reason": "it [was] so", "workers": 2}
    with follow(console) as listen:
        say = lambda kind, **data: listen(Event(kind, data))  # noqa: E731
        say("start", method="GLoRA", task="[t]", model="m", out="o", metric="rouge_l", **ranks, **sizes, **how)
        say("phase", phase="base", total=1, done=0)
        for phase in ("federation", "local"):
            say("phase", phase=phase, total=2, done=0)
            for n in (1, 2):
                for done in (1, 2):
                    say("client", phase=phase, round_num=n, client_id="a", done=done, cohort=2, train_loss=1.0)
                    if isinstance(listen, Live):
                        listen.progress.refresh()
                found = {"loss": 2.0, "perplexity": 7.4, "rouge_l": n / 10} if phase == "federation" else None
                rejected = {"client-1": "holds NaN"} if n == 2 else {}
                say("round", phase=phase, record={**record, "round_num": n, "eval": found, "rejected": rejected})
        say("phase", phase="final", total=1, done=0)
        say("end", summary={})
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_the_live_display(width: int) -> None:
    shown = show(Console(file=io.StringIO(), force_terminal=True, width=width))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert text != shown
    assert re.search(r"federation .*0/2 rounds, 1/2 clients", text)
    assert re.search(r"federation .*1/2 rounds, 2/2 clients +loss 1\.500 +rouge_l 0\.100 .*left", text)
    assert re.search(r"clients alone .*2/2 rounds +loss 1\.500 +0 s", text)
    assert "round 2: the update of client-1 was left out: holds NaN" in text
    assert "GLoRA on [t]: 2 clients, ranks 2, 4, 2 rounds; m of 1,000 parameters, 100 trained" in " ".join(text.split())
    assert "sequential engine (it [was] so), 2 processes" in " ".join(text.split())
    assert max(len(line) for line in re.split(r"[\r\n]+", text)) <= width


def test_a_pipe_gets_a_line_a_round() -> None:
    shown = show(Console(file=io.StringIO(), width=60)).splitlines()
    rounds = [line for line in shown if line.startswith("  round") and "/" in line]
    assert rounds[1].startswith("  round 2/2  loss 1.500  rouge_l 0.200  2 clients  up 10 B, down 20 B")
    assert len(rounds) == 4
    assert "  round 2: the update of client-1 was left out: holds NaN" in shown


def test_a_full_gpu_is_answered_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is torch's own; there is no GPU here to fill."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("fedspan.runs.execution.run", full)
    assert main(["run", "--out", str(tmp_path / "run")]) == 2
    assert re.fullmatch(r"fedspan: .*memory is full; try a smaller local\.batch_size.*\n", capsys.readouterr().err)
