"""The command line: one message and the right exit code, before anything heavy starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fp8rl import cli
from fp8rl.config.file import dump_config, load_config
from fp8rl.config.rollout import Precision
from fp8rl.config.run import RunConfig
from fp8rl.doctor import machine as doctor
from fp8rl.errors import ConfigError, EngineDiedError

FEATURES = [name for names in doctor.FEATURES for name in names]
Loop = Callable[[RunConfig, bool, str], Path]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"run_dir: {tmp_path / 'run'}\n")
    return path


@pytest.fixture(autouse=True)
def full_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    has_all = doctor.Machine(dict.fromkeys(FEATURES, True), (), frozenset(doctor.MODULES))
    monkeypatch.setattr(doctor.Machine, "here", lambda: has_all)
    monkeypatch.delenv("RANK", raising=False)


def fake_loop(monkeypatch: pytest.MonkeyPatch, train: Loop) -> None:
    module = ModuleType("fp8rl.loop")
    module.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fp8rl.loop", module)


def never(config: RunConfig, resume: bool, command: str) -> Path:
    raise AssertionError("the run was started")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def finish(config: RunConfig, resume: bool, command: str) -> Path:
    config.run_dir.mkdir(exist_ok=True)
    (config.run_dir / "config.yaml").write_text(dump_config(config))
    (config.run_dir / "result.json").write_text('{"command": ' + json.dumps(command) + "}")
    return config.run_dir


def test_a_run_ends_with_its_folder_on_the_last_line(
    monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path
) -> None:
    fake_loop(monkeypatch, finish)
    result = run("train", config)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == str(tmp_path / "run")


def test_json_is_the_result_and_the_command_says_what_was_typed(
    monkeypatch: pytest.MonkeyPatch, config: Path
) -> None:
    fake_loop(monkeypatch, finish)
    result = run("train", config, "steps=3", "--precision", "fp8", "--json")
    command = f"fp8rl train {config} steps=3 --precision fp8 --json"
    assert json.loads(result.stdout.splitlines()[-1]) == {"command": command}


@pytest.mark.parametrize("precision", get_args(Precision))
def test_precision_and_overrides_reach_the_run(
    monkeypatch: pytest.MonkeyPatch, config: Path, precision: Precision
) -> None:
    seen: list[RunConfig] = []
    fake_loop(monkeypatch, lambda run, resume, command: seen.append(run) or finish(run, resume, ""))
    assert run("train", config, "seed=9", "--precision", precision).exit_code == 0
    assert (seen[0].seed, seen[0].rollout.precision) == (9, precision)


def test_resume_takes_the_config_of_the_folder_also_when_it_was_moved(
    monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path
) -> None:
    finish(load_config(config, ["seed=5"]), False, "")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    seen: list[tuple[int, Path, bool]] = []

    def train(config: RunConfig, resume: bool, command: str) -> Path:
        seen.append((config.seed, config.run_dir, resume))
        return config.run_dir

    fake_loop(monkeypatch, train)
    assert run("train", "--resume", moved).exit_code == 0
    assert seen == [(5, moved, True)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stepz=3"], "unknown key 'stepz'; did you mean 'steps'?"),
        (["model.hidden_size=200"], "hidden_size is 200, not a multiple of 128"),
        (["loss.clip_high=-1"], "loss.clip_high"),
        (["task.heldout_prompts=99999"], "task.heldout_prompts is 99999"),
        (["nonsense"], "not of the form a.b=c"),
        (["--precision", "fp4"], "fp4"),
        (["--wrong"], "--wrong"),
    ],
)
def test_a_bad_config_ends_with_one_message_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, config: Path, arguments: list[str], message: str
) -> None:
    fake_loop(monkeypatch, never)
    result = run("train", config, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (config.parent / "run").exists()


def test_missing_avx512_ends_with_one_message_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, config: Path
) -> None:
    fake_loop(monkeypatch, never)
    no_avx512 = doctor.Machine(
        dict.fromkeys(FEATURES, True) | {"avx512": False}, (), frozenset(doctor.MODULES)
    )
    monkeypatch.setattr(doctor.Machine, "here", lambda: no_avx512)
    result = run("train", config)
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert "AVX-512" in line


def test_a_folder_that_holds_a_run_is_refused(
    monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path
) -> None:
    finish(load_config(config), False, "")
    fake_loop(monkeypatch, never)
    result = run("train", config)
    assert result.exit_code == 2
    assert f"--resume {tmp_path / 'run'}" in result.stderr


@pytest.mark.parametrize("extra", [["CONFIG"], ["CONFIG", "steps=3"], ["--precision", "fp8"]])
def test_resume_refuses_another_config(
    monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path, extra: list[str]
) -> None:
    finish(load_config(config), False, "")
    fake_loop(monkeypatch, never)
    given = [str(config) if argument == "CONFIG" else argument for argument in extra]
    result = run("train", *given, "--resume", tmp_path / "run")
    assert (result.exit_code, "leave out CONFIG" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    "arguments", [["train"], ["train", "--resume", "no/such"], ["report", "no"]]
)
def test_what_is_not_there_ends_with_exit_code_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


def failing(error: BaseException) -> Loop:
    def train(config: RunConfig, resume: bool, command: str) -> Path:
        raise error

    return train


def test_an_engine_that_dies_is_one_message_a_pointer_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path
) -> None:
    fake_loop(monkeypatch, failing(EngineDiedError("the engine ended: out of memory")))
    result = run("train", config)
    assert result.exit_code == 1
    first, second = result.stderr.splitlines()
    assert "out of memory" in first
    assert str(tmp_path / "run" / "engine.log") in second


def test_a_refusal_by_the_loop_is_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, config: Path
) -> None:
    fake_loop(monkeypatch, failing(ConfigError("too small")))
    assert run("train", config).exit_code == 2


def test_ctrl_c_is_exit_code_130_and_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path
) -> None:
    def train(config: RunConfig, resume: bool, command: str) -> Path:
        finish(config, resume, command)
        raise KeyboardInterrupt

    fake_loop(monkeypatch, train)
    result = run("train", config)
    assert result.exit_code == 130
    assert f"--resume {tmp_path / 'run'}" in result.stderr


def test_ctrl_c_before_the_run_has_a_folder_names_none(
    monkeypatch: pytest.MonkeyPatch, config: Path
) -> None:
    fake_loop(monkeypatch, failing(KeyboardInterrupt()))
    result = run("train", config)
    assert (result.exit_code, result.stderr) == (130, "fp8rl: stopped by Ctrl-C\n")


def test_ctrl_c_while_modules_load_cannot_be_swallowed(tmp_path: Path) -> None:
    module = tmp_path / "torch.py"  # found before the real one
    module.write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException:\n    pass\n"
        "raise SystemExit(7)\n"
    )
    (tmp_path / "run.yaml").touch()
    ended = subprocess.run(
        [sys.executable, "-m", "fp8rl", "train", str(tmp_path / "run.yaml")],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (130, "fp8rl: stopped by Ctrl-C\n")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    fake_loop(monkeypatch, failing(ValueError("not one of ours")))
    result = run("train", config)
    assert result.exit_code == 1
    assert isinstance(result.exception, ValueError)


def test_more_ranks_than_one_are_launched_with_the_same_command_line(
    monkeypatch: pytest.MonkeyPatch, config: Path
) -> None:
    launched: list[tuple[list[str], int]] = []
    fake_loop(monkeypatch, never)
    monkeypatch.setattr(
        "fp8rl.launch.launch", lambda arguments, ranks: launched.append((arguments, ranks)) or 7
    )
    two = ["trainer.tensor_parallel=2", "--precision", "fp8", "--json"]
    assert run("train", config, *two).exit_code == 7
    assert launched == [(["train", str(config), *two], 2)]


@pytest.mark.parametrize(("rank", "printed"), [("0", True), ("1", False)])
def test_a_launched_rank_runs_the_loop_and_only_the_first_prints(
    monkeypatch: pytest.MonkeyPatch, config: Path, rank: str, printed: bool
) -> None:
    fake_loop(monkeypatch, finish)
    monkeypatch.setenv("RANK", rank)
    result = run("train", config, "trainer.tensor_parallel=2")
    assert (result.exit_code, bool(result.stdout)) == (0, printed)


@pytest.mark.parametrize("command", ["train", "report", "doctor"])
def test_every_command_teaches_by_example(command: str) -> None:
    help_text = run(command, "--help").stdout
    assert f"fp8rl {command}" in help_text
    assert "Example" in help_text


def test_the_doctor_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("doctor", "--no-engine", "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["ok"] is True
    assert {finding["name"] for finding in report["findings"]} >= {
        "vllm",
        "AVX-512",
        "AMX tiles or AVX-512 BF16",
    }


def test_the_doctor_ends_with_1_and_the_price_where_something_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bare = doctor.Machine(dict.fromkeys(FEATURES, False), (), frozenset())
    monkeypatch.setattr(doctor.Machine, "here", lambda: bare)
    result = run("doctor", "--no-engine")
    assert result.exit_code == 1
    assert "MISSING" in result.stdout
    assert "make setup" in " ".join(result.stdout.split())


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    program = (
        "import sys, fp8rl.cli\n"
        "heavy = {'torch', 'vllm', 'megatron', 'transformers', 'pydantic', 'matplotlib', 'numpy'}\n"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "fp8rl", "--help"], check=True, stdout=subprocess.DEVNULL)
    assert time.monotonic() - start < 5  # 0.3 s on an idle machine; CI may be busy


RANK_PROGRAM = """
import os, pathlib, signal, sys, time
folder, mode = pathlib.Path(sys.argv[1]), sys.argv[2]
count = 0
def interrupted(number, frame):
    global count
    count += 1
signal.signal(signal.SIGINT, interrupted)
rank = os.environ["RANK"]
(folder / f"pid-{rank}").write_text(str(os.getpid()))
if mode == "fail" and rank == "1":
    sys.exit(3)
while mode == "wait" and not count:
    time.sleep(0.05)
time.sleep(0.5 if mode == "wait" else 0)
(folder / f"saved-{rank}").write_text(str(count))
sys.exit(130 if count else 0)
"""


def launched(tmp_path: Path, mode: str) -> list[Any]:
    program = tmp_path / "rank.py"
    program.write_text(RANK_PROGRAM)
    code = (
        "import sys; from fp8rl.launch import launch; "
        f"sys.exit(launch([{str(tmp_path)!r}, {mode!r}], 2, program=[{str(program)!r}]))"
    )
    return [sys.executable, "-c", code]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize(("mode", "code"), [("pass", 0), ("fail", 1)])
def test_launch_passes_on_how_the_ranks_ended(tmp_path: Path, mode: str, code: int) -> None:
    ended = subprocess.run(launched(tmp_path, mode), capture_output=True, timeout=120, check=False)
    assert ended.returncode == code, ended.stderr


def test_ctrl_c_reaches_each_rank_once_and_leaves_no_process(tmp_path: Path) -> None:
    process = subprocess.Popen(launched(tmp_path, "wait"), start_new_session=True)
    pid_files = [tmp_path / f"pid-{rank}" for rank in range(2)]
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in pid_files):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # the terminal signals the whole foreground group
    assert process.wait(timeout=60) == 130
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in range(2)] == ["1", "1"]
    assert not any(alive(int(file.read_text())) for file in pid_files)
