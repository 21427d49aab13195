"""`fp8rl quantize`: one message and the right exit code, the report, and the memory it takes."""

from __future__ import annotations

import csv
import json
import math
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

from fp8rl import cli
from fp8rl.quant import QuantPlan, dequantize_blockwise, measure_error, quantize_blockwise
from fp8rl.quant.checkpoint_errors import TensorError
from fp8rl.quantize_report import COLUMNS, error_figure, write_report
from tests.quant import checkpoint_files as files

ROOT = Path(__file__).parents[2]
CONFIG = files.config_of("qwen3", num_hidden_layers=2)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return files.save(tmp_path / "source", CONFIG, files.random_tensors(CONFIG), shards=2)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, ["quantize", *map(str, arguments)])


def quantized() -> set[str]:
    return {entry.name for entry in QuantPlan.from_hf_config(CONFIG).entries if entry.quantized}


def test_there_and_back_the_last_line_is_the_folder(source: Path, tmp_path: Path) -> None:
    there = run(source, tmp_path / "fp8")
    assert there.exit_code == 0, there.output
    assert there.stdout == f"{tmp_path / 'fp8'}\n"
    assert "14 tensors quantized to FP8" in there.stderr
    assert "of the largest shard" in there.stderr
    back = run(tmp_path / "fp8", tmp_path / "back", "--to", "bf16")
    assert back.stdout == f"{tmp_path / 'back'}\n"
    assert files.config_in(tmp_path / "back") == CONFIG
    found = files.load(tmp_path / "back")
    for name in quantized():
        expected = dequantize_blockwise(quantize_blockwise(files.load(source)[name]))
        assert files.same(found[name], expected)


def test_json_is_the_result(source: Path, tmp_path: Path) -> None:
    done = run(source, tmp_path / "fp8", "--json", "--keep", "*.o_proj", "--keep-last-layers", "1")
    result = json.loads(done.stdout)
    assert result["options"]["keep_patterns"] == ["*.o_proj"]
    assert result["converted_tensors"] == 6
    reason = result["kept"]["model.layers.0.self_attn.o_proj.weight"]
    assert "matches pattern '*.o_proj'" in reason
    assert result["memory_peak_bytes"] >= result["memory_before_bytes"] > 0
    shards = source.glob("*.safetensors")
    assert result["largest_shard_bytes"] == max(path.stat().st_size for path in shards)
    assert not (tmp_path / "fp8" / "quantization_report").exists()


def test_the_report_has_every_tensor_worst_first(source: Path, tmp_path: Path) -> None:
    done = run(source, tmp_path / "fp8", "--report")
    assert done.exit_code == 0, done.output
    report = tmp_path / "fp8" / "quantization_report"
    with (report / "errors.csv").open() as table:
        rows = list(csv.DictReader(table))
    tensors = files.load(source)
    assert {row["tensor"] for row in rows} == quantized()
    rms = [float(row["relative_rms"]) for row in rows]
    assert rms == sorted(rms, reverse=True)
    for row in rows:
        x = tensors[row["tensor"]]
        expected = measure_error(x, dequantize_blockwise(quantize_blockwise(x), torch.float32))
        assert float(row["relative_rms"]) == pytest.approx(expected.relative_rms, rel=1e-5)
        assert float(row["sqnr_db"]) == pytest.approx(expected.sqnr_db, rel=1e-5)
        assert row["shape"] == "x".join(map(str, x.shape))
    assert (report / "errors.png").read_bytes().startswith(PNG)
    result = json.loads((report / "result.json").read_text())
    assert result["worst"]["name"] == rows[0]["tensor"]
    assert rows[0]["tensor"].rpartition(".")[0] in done.stderr.replace("\n ", "")


def error(name: str, rms: float, **changes: Any) -> TensorError:
    values = {"sqnr_db": 30.0, "saturated": 0.0, "zero_blocks": 0, "blocks": 4} | changes
    return TensorError(name, (256, 256), rms, **values)


@pytest.mark.parametrize(
    "errors",
    [
        [],
        [error("one", 0.0, sqnr_db=float("inf"))],
        [error("a.b.1.w", float("inf"), sqnr_db=-float("inf")), error("model.layers.3.x.q", 0.02)],
        [error(f"model.layers.{i}.mlp.experts.{i}.w{i % 40}.weight", 0.03) for i in range(300)],
    ],
)
def test_any_errors_can_be_drawn(errors: Sequence[TensorError], tmp_path: Path) -> None:
    report = write_report(tmp_path, errors, {}, "any")
    assert (report / "errors.png").read_bytes().startswith(PNG)
    assert len((report / "errors.csv").read_text().splitlines()) == 1 + len(errors)
    shown = error_figure(errors, "any").axes[0].get_yticklabels()
    assert len(shown) == min(20, sum(e.relative_rms != float("inf") for e in errors))


def test_the_table_says_what_its_columns_are(tmp_path: Path) -> None:
    report = write_report(tmp_path, [error("a", 0.5, saturated=0.25)], {}, "any")
    assert (
        report / "errors.csv"
    ).read_text() == f"{','.join(COLUMNS)}\na,256x256,0.5,30,0.25,0,4\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere", "fp8"], 2, "nowhere: is not a folder"),
        (["source", "source"], 2, "neither inside the other"),
        (["source", "taken"], 2, "taken: is there already"),
        (["source", "fp8", "--keep", "lm_head"], 2, "'lm_head'"),
        (["source", "fp8", "--to", "bf16"], 2, "is no blockwise FP8 checkpoint"),
        (["fp32", "fp8"], 2, "--fp32-as master"),
        (["truncated", "fp8"], 2, "model-00001-of-00002.safetensors: is truncated"),
        (["nan", "fp8"], 1, "model.safetensors: tensor 'model.norm.weight': 1 non-finite"),
        (["source", "/proc/fp8"], 1, "/proc/fp8.partial: cannot be written"),
    ],
)
def test_what_does_not_work_is_one_message(
    arguments: list[str], code: int, message: str, source: Path, tmp_path: Path
) -> None:
    tensors = files.random_tensors(CONFIG)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    files.save(tmp_path / "fp32", CONFIG, {n: t.float() for n, t in tensors.items()})
    shard = files.save(tmp_path / "truncated", CONFIG, tensors, shards=2)
    os.truncate(shard / "model-00001-of-00002.safetensors", 50_000)
    tensors["model.norm.weight"][7] = float("nan")
    files.save(tmp_path / "nan", CONFIG, tensors)
    places = [str(tmp_path / place) for place in arguments[:2]]
    done = run(*places, *arguments[2:])
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("fp8rl: ")
    assert message in line
    assert not (tmp_path / "fp8").exists()


def test_on_a_terminal_there_is_a_bar(source: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "fp8rl", "quantize", str(source), str(tmp_path / "fp8")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, cwd=ROOT, env=environment
    ) as process:
        os.close(theirs)
        seen = b""
        try:
            while chunk := os.read(ours, 65536):
                seen += chunk
        except OSError:  # the other end was closed
            pass
        assert process.wait(120) == 0
    assert b"model-00002-of-00002.safetensors" in seen
    assert "\u2501".encode() in seen


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 250 MB."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16}
    config = files.config_of("llama", num_hidden_layers=4, num_key_value_heads=4, **sizes)
    noise = torch.randn(8192 * 2048).bfloat16() * 0.02
    tensors = {
        entry.name: noise[: math.prod(entry.shape)].view(entry.shape).clone()
        for entry in QuantPlan.from_hf_config(config).entries
    }
    return files.save(tmp_path_factory.mktemp("big") / "source", config, tensors, shards=2)


MEASURED = """
import atexit, re, sys
from pathlib import Path
def size(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
from fp8rl.cli import main
import fp8rl.quantize_command
before = size("VmRSS")
atexit.register(lambda: print(size("VmHWM") - before, file=sys.stderr))
main()
"""


def measured(source: Path, destination: Path, *options: str) -> tuple[dict[str, Any], int]:
    """Convert in a process of its own; its result, and by how many bytes it grew at most."""
    places = [str(source), str(destination)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "quantize", *places, *options, "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), int(done.stderr.splitlines()[-1])


@pytest.fixture(scope="module")
def big_fp8(big: Path) -> tuple[Path, dict[str, Any], int]:
    """The big checkpoint converted, and what that took."""
    return big.with_name("fp8"), *measured(big, big.with_name("fp8"), "--report")


@pytest.mark.slow
def test_memory_stays_under_twice_the_largest_shard(
    big: Path, big_fp8: tuple[Path, dict[str, Any], int], tmp_path: Path
) -> None:
    """As the kernel counts it: the highest resident size, less that of the loaded program."""
    fp8, *there = big_fp8
    back = measured(fp8, tmp_path / "back", "--to", "bf16")
    for source, (result, grown) in ((big, there), (fp8, back)):
        largest = max(path.stat().st_size for path in source.glob("*.safetensors"))
        assert largest > 120e6
        assert grown < 2 * largest
        assert result["memory_in_largest_shards"] == pytest.approx(grown / largest, rel=0.2)


@pytest.mark.slow
def test_killed_from_outside_it_goes_on(
    big: Path, big_fp8: tuple[Path, dict[str, Any], int], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "fp8rl", "quantize", str(big), str(tmp_path / "fp8")]
    process = subprocess.Popen([*command, "--report"], cwd=ROOT)
    progress = tmp_path / "fp8.partial" / "progress.jsonl"
    while not progress.exists() or len(progress.read_bytes().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "fp8").exists()
    again = subprocess.run(
        [*command, "--report", "--json"], cwd=ROOT, stdout=subprocess.PIPE, timeout=300
    )
    assert json.loads(again.stdout)["resumed_bytes"] >= 2**26
    found, expected = files.file_bytes(tmp_path / "fp8"), files.file_bytes(big_fp8[0])
    assert found.keys() == expected.keys()
    for name in found.keys() - {"quantization_report/result.json"}:  # it has the seconds
        assert found[name] == expected[name], name
