"""The architecture: imports go strictly downwards, heavy libraries stay behind their one door."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fedspan

PACKAGE = Path(fedspan.__file__).parent

# From the bottom up. Every unit is a folder of the package, or one of its few loose modules; it imports from lower
# layers only, and has no cycles inside.
LAYERS = (
    {"support"},
    {"algebra", "config", "events"},
    {"methods"},
    {"adapters", "data", "wire", "robust", "streaming"},
    {"models"},
    {"privacy", "merging"},
    {"client"},
    {"federation", "distributed"},
    {"server", "site", "diagnostics"},
    {"runs", "regions"},
    {"display", "comparison"},
    {"api", "inspection", "reporting", "bench", "flower"},
    {"auditing"},
    {"cli"},
    {"__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
DOORS = {
    "transformers": {"models.loading", "merging.full_model", "bench.peers"},
    "peft": {"models.build", "merging.task_rules", "bench.peers"},
    "datasets": {"data.hub"},
    "matplotlib": {"display.curves", "bench.plot", "inspection.picture", "reporting.charts"},
    "jinja2": {"support.templating"},
    "accelerate": {"runs.tracking", "models.placement"},
    "bitsandbytes": {"models.quantised"},
    "triton": {"models.dropout_kernel", "models.attention_kernel"},
    "flwr": {f"flower.{path.stem}" for path in (PACKAGE / "flower").glob("*.py")},
    "dp_accounting": {"privacy.pld"},
    "Crypto": {"privacy.primitives"},
    "rich": {f"display.{path.stem}" for path in (PACKAGE / "display").glob("*.py")} | {"inspection.round_table"},
    "typer": {f"cli.{path.stem}" for path in (PACKAGE / "cli").glob("*.py")},
}
PICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def module_name(path: Path) -> str:
    """`data/load.py` -> `data.load`, `data/__init__.py` -> `data`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Every dotted name that the file imports anywhere, in functions and under TYPE_CHECKING too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inner(path: Path) -> set[str]:
    """The modules of this package that the file imports."""
    found = set()
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top != "fedspan":
            continue
        rest = fedspan._HOME[rest][0].removeprefix("fedspan.") if rest in fedspan._HOME else rest
        while rest and rest not in MODULES:
            rest = rest.rpartition(".")[0]
        assert rest, f"{path.name} imports {name}, which is no module here"
        found.add(rest)
    return found


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_strictly_downwards(name: str) -> None:
    unit = name.split(".")[0]
    assert unit in LEVEL, f"{name} has no layer: give it one in {Path(__file__).name}"
    for other in inner(MODULES[name]):
        other_unit = other.split(".")[0]
        if other_unit != unit:
            assert LEVEL[other_unit] < LEVEL[unit], f"{name} imports {other} from its own layer or one above"


def test_every_layer_is_a_file() -> None:
    assert set(LEVEL) == {name.split(".")[0] for name in MODULES}


def test_few_modules_are_loose_and_no_chain_of_imports_is_long() -> None:
    loose = [path.name for path in PACKAGE.glob("*.py")]
    assert len(loose) <= 3, f"{loose}: expected folders"
    lower: dict[str, set[str]] = {unit: set() for unit in LEVEL}
    for name, path in MODULES.items():
        unit = name.split(".")[0]
        lower[unit] |= {other.split(".")[0] for other in inner(path)} - {unit}
    depth: dict[str, int] = {}
    for unit in TopologicalSorter(lower).static_order():
        depth[unit] = 1 + max((depth[other] for other in lower[unit]), default=0)
    assert max(depth.values()) <= 14


def test_the_documented_layers_are_these() -> None:
    page = PACKAGE.parents[1] / "docs" / "layout.md"
    if not page.exists():
        pytest.skip("installed without the repository")
    rows = [line.split("|")[1:3] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    listed = {name.strip(" `"): int(layer) for layer, name in rows if layer.strip().isdigit()}
    folders = {name: level + 1 for name, level in LEVEL.items() if (PACKAGE / name).is_dir()}
    assert listed == folders


def test_no_cycles_inside_a_folder() -> None:
    TopologicalSorter({name: inner(path) - {name} for name, path in MODULES.items()}).prepare()


@pytest.mark.parametrize("library", DOORS)
def test_a_heavy_library_has_one_door(library: str) -> None:
    users = {n for n, path in MODULES.items() if any(i.split(".")[0] == library for i in imports(path))}
    assert users <= DOORS[library]
    assert users, f"nothing imports {library} any more"


def test_nothing_is_unpickled() -> None:
    for name, path in MODULES.items():
        assert not {i.split(".")[0] for i in imports(path)} & PICKLERS, name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) != "torch.load", name
                allowed = [k.value for k in node.keywords if k.arg == "allow_pickle"]
                assert all(isinstance(v, ast.Constant) and v.value is False for v in allowed), name


def test_only_commands_print() -> None:
    for name, path in MODULES.items():
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        printing = [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]
        assert not printing or name.startswith("cli.") or name == "site.worker", name


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import fedspan, fedspan.cli.main", "torch transformers peft datasets numpy pydantic sklearn matplotlib"),
        (
            "import fedspan.algebra.subspace, fedspan.methods, fedspan.merging.one_shot",
            "transformers peft datasets sklearn typer",
        ),
        ("import fedspan.runs.execution", "transformers peft datasets typer rich matplotlib"),
    ],
)
def test_imports_stay_light(statement: str, absent: str) -> None:
    code = f"{statement}; import sys; print(*sorted(set({absent.split()!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_public_names_are_what_they_say() -> None:
    """And no file takes a function's name: importing it would hide the function."""
    assert not {path.stem for path in PACKAGE.iterdir()} & set(fedspan._HOME)
    code = (
        "import fedspan, fedspan.runs.execution; from fedspan import run, merge;"
        "assert callable(run) and callable(merge) and fedspan.runs.execution.Result is fedspan.Result;"
        "assert all(getattr(fedspan, n) is not None for n in fedspan.__all__); assert fedspan.__version__"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(fedspan.__all__) == set(fedspan._HOME) <= set(dir(fedspan))
    with pytest.raises(AttributeError, match="no attribute 'rum'"):
        fedspan.rum  # noqa: B018
