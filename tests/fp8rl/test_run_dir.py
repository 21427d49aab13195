"""The run folder: what is refused, what a kill can do to it, and who may hold it."""

import json
import math
import signal
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8rl.errors import RunDirError
from fp8rl.run_dir import RunDir, write_file

NUMBERS = st.one_of(st.integers(-(2**60), 2**60), st.floats())
NAMES = st.text(min_size=1).filter(lambda name: name != "step")
HOLD = """
import sys, time
from pathlib import Path
from fp8rl.run_dir import RunDir
with RunDir.open(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path):
    return RunDir.create(tmp_path / "runs" / "demo", "steps: 3\n")


def test_a_new_run_holds_its_configuration(run):
    assert run.config.read_text() == "steps: 3\n"
    assert run.metrics() == []
    assert run.read_result() is None
    assert RunDir.open(run.path) == run


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(run):
    with pytest.raises(RunDirError, match=r"holds a run already.*--resume.*another run_dir"):
        RunDir.create(run.path, "steps: 4\n")
    assert run.config.read_text() == "steps: 3\n"
    assert [file.name for file in run.path.iterdir()] == ["config.yaml"]


def test_a_file_in_the_way_of_the_folder_is_refused(tmp_path):
    (tmp_path / "demo").write_text("")
    with pytest.raises(RunDirError, match="demo"):
        RunDir.create(tmp_path / "demo", "")


def test_open_refuses_what_is_no_run(tmp_path):
    with pytest.raises(RunDirError, match="no such run folder"):
        RunDir.open(tmp_path / "nowhere")
    with pytest.raises(RunDirError, match=r"no config\.yaml"):
        RunDir.open(tmp_path)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.dictionaries(NAMES, NUMBERS | st.text(max_size=9)), max_size=5))
def test_metrics_come_back_as_written_and_every_line_is_strict_json(tmp_path_factory, rows):
    run = RunDir.create(tmp_path_factory.mktemp("run") / "r", "")
    written = [{"step": step, **row} for step, row in enumerate(rows)]
    for row in written:
        run.append(row)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    for line in run.metrics_file.read_text().split("\n")[:-1] if rows else []:
        json.loads(line, parse_constant=refuse)
    assert repr(RunDir.open(run.path).metrics()) == repr(written)  # repr: NaN differs from itself


def test_a_kill_in_the_middle_of_a_line_loses_that_line_alone(run):
    run.append({"step": 1, "loss": 0.5})
    first = run.metrics_file.read_bytes()
    run.append({"step": 2, "loss": math.nan})
    both = run.metrics_file.read_bytes()
    for cut in range(len(first), len(both)):
        run.metrics_file.write_bytes(both[:cut])
        resumed = RunDir.open(run.path)
        assert resumed.metrics() == [{"step": 1, "loss": 0.5}]
        resumed.append({"step": 2, "loss": 0.25})
        assert resumed.metrics() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]


def test_a_broken_line_elsewhere_is_an_error_that_names_it(run):
    for step in (1, 2, 3):
        run.append({"step": step})
    lines = run.metrics_file.read_text().splitlines(keepends=True)
    run.metrics_file.write_text(lines[0] + '{"st\n' + lines[2])
    with pytest.raises(RunDirError, match=r"metrics\.jsonl: line 2 is broken"):
        run.metrics()


def test_a_step_is_written_once(run):
    run.append({"step": 4})
    with pytest.raises(RunDirError, match="has step 4 already, cannot append step 4"):
        RunDir.open(run.path).append({"step": 4})
    with pytest.raises(RunDirError, match="integer 'step', found None"):
        run.append({"loss": 1.0})


def test_truncation_drops_the_steps_after_and_no_other(run):
    for step in range(6):
        run.append({"step": step})
    run.truncate_metrics(after_step=3)
    assert [line["step"] for line in run.metrics()] == [0, 1, 2, 3]
    run.append({"step": 4})
    assert [line["step"] for line in run.metrics()] == [0, 1, 2, 3, 4]


def test_a_result_comes_back_and_nan_is_no_result(run):
    run.write_result({"steps": 3, "best": None})
    assert run.read_result() == {"steps": 3, "best": None}
    with pytest.raises(ValueError, match="JSON"):
        run.write_result({"best": math.nan})
    assert run.read_result() == {"steps": 3, "best": None}


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_file(path, b"old")

    def full(_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"


def test_one_process_holds_the_folder_and_its_death_frees_it(run):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunDirError, match=rf"process {holder.pid} is running"), run.locked():
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with run.locked():
        pass
