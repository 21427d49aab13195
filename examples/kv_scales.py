"""What do KV-cache scales do to RL? The real loop with good, old and no scales, on two models.

    python examples/kv_scales.py [KEY=VALUE ...]        (--help says more)

Arms: all have FP8 weights, and of the rollout engine's KV cache

    bf16-kv     BF16, no scales: the baseline
    ones        FP8, every scale 1.0: what an engine uses to which nobody sent scales
    once        FP8, calibrated on version 0 and never again
    stale       FP8, calibrated on the version of N steps ago
    every-step  FP8, calibrated on each version: what fp8rl does

`ones` and `once` are `kv_scales.recalibrate` never and once. fp8rl refuses scales of another
version than the weights, so `StaleScales` makes those of `stale` in the open: it relabels them.
Whatever was published, the loop reads the engine's own buffers after each publish of each arm, and
stops if one differs (`Calibration.confirm`).

Models: `qwen3` is that of grpo.yaml; norms on q and k keep both small. `qwen2` has biases instead.
`qwen2-outliers` is the same with outlier channels planted in every layer's K bias after the
warm-up, as Qwen2.5 has them (``fp8rl/key_outliers.py``): k + b falls on one code of E4M3 or on the
next, and the logit gets a rounding error for k. A power-of-two scale moves no code, and none of a
whole tensor brings them closer.

Each arm is a run folder, OUT/MODEL/ARM/seed-N. After a kill the same command keeps the arms that
have ended and starts the one that was running anew. Left out: FP8 attention (no q is quantized).
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from fp8rl.calibration import Calibration
from fp8rl.config.file import load_config
from fp8rl.config.run import RunConfig
from fp8rl.doctor.machine import check_machine
from fp8rl.errors import ConfigError, RunDirError
from fp8rl.loop import step
from fp8rl.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE, VERMILION
from fp8rl.quant import KVObserver, KVScales
from fp8rl.rollout_batch import prompts_batch
from fp8rl.run_dir import Metrics, RunDir
from fp8rl.session import Session, open_session

Model = StrEnum("Model", "qwen3 qwen2 qwen2-outliers")
Arm = StrEnum("Arm", "bf16-kv ones once stale every-step")
MODELS, ARMS = [Model("qwen3"), Model("qwen2-outliers")], list(Arm)
COLOURS = (GREY, VERMILION, ORANGE, PURPLE, BLUE)  # of ARMS
RECALIBRATE = {"ones": "never", "once": "once"}
EXAMPLES = """
Examples:

- `python examples/kv_scales.py`: two models, five arms

- `python examples/kv_scales.py --models qwen2-outliers --arms every-step --out runs/fp32
  kv_scales.scale_format=fp32`: one arm with another rule
"""

app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode="markdown")


@dataclass(frozen=True)
class Study:
    """One arm on one model with one seed: a run."""

    model: Model
    arm: Arm
    seed: int
    steps: int
    stale: int
    outlier: float
    out: Path
    overrides: tuple[str, ...]

    @property
    def names(self) -> tuple[str, str]:
        """Model and arm, with their options."""
        model = f"{self.model}-{self.outlier:g}" if "outliers" in self.model else self.model
        return model, f"{self.arm}-{self.stale}" if self.arm == "stale" else self.arm

    @property
    def folder(self) -> RunDir:
        return RunDir(self.out.joinpath(*self.names, f"seed-{self.seed}"))

    @cached_property
    def config(self) -> RunConfig:
        """Raises ConfigError where the overrides do not fit."""
        settings = (
            f"seed={self.seed}",
            f"steps={self.steps}",
            f"model.family={self.model.removesuffix('-outliers')}",
            f"rollout.precision={'fp8' if self.arm == 'bf16-kv' else 'fp8-kv'}",
            f"kv_scales.recalibrate={RECALIBRATE.get(self.arm, 'every-step')}",
            "kv_scales.measured_by=trainer",
            f"warmup.key_outliers={self.outlier if 'outliers' in self.model else 'null'}",
        )
        config = load_config(Path(__file__).with_name("grpo.yaml"), [*self.overrides, *settings])
        if config.world_size > 1:
            raise ConfigError("the study has one trainer rank; leave out trainer.*_parallel")
        check_machine(config)
        return config.model_copy(update={"run_dir": self.folder.path})

    def ended(self) -> bool:
        """Whether it is done; raises RunDirError if it was done with another config."""
        if not self.folder.result.is_file():
            return False
        done = load_config(self.folder.config).model_copy(update={"run_dir": self.folder.path})
        if done != self.config:
            raise RunDirError(f"{self.folder.path}: is of another config; take another --out")
        return True

    def run(self, command: str) -> None:
        """Do it from the start, as fp8rl.loop.train would, with the scales of this arm."""
        if self.folder.path.exists():
            shutil.rmtree(self.folder.path)
        with open_session(self.config, resume=False, command=command) as run:
            if self.arm == "stale":
                run.serving.calibration = StaleScales(run, self.stale)
            (self.folder.path / "key_channels.json").write_text(json.dumps(key_channels(run)))
            assert run.engine is not None  # the trainer has one rank
            capacity: Metrics = {"kv/cache_tokens": run.engine.kv_cache_tokens}
            for version in range(self.steps + 1):
                run.record(step(run, version) | capacity)


class StaleScales(Calibration):
    """Scales that fp8rl would not publish: of an older version; they say so."""

    def __init__(self, run: Session, late: int) -> None:
        """Calibrate ``late`` versions ago; on version 0 before that."""
        usual = run.calibration
        assert usual is not None  # the cache is FP8
        sources = (run.config.kv_scales, run.trainer, run.engine)
        super().__init__(*sources, prompts=usual.batch, fixed=usual.trained)
        self._late = late
        self._measured: list[KVScales] = []

    def measure(self, version: int, *, anew: bool = False) -> KVScales:
        """Return the scales to publish with ``version``; called once for each, from 0 on."""
        fresh = super().measure(version, anew=anew)
        assert isinstance(fresh, KVScales)  # kv_scales.measured_by is trainer
        self._measured.append(fresh)
        used = self._measured[max(0, version - self._late)]
        return replace(used, version=version, observer=f"study: measured on version {used.version}")


class KeyObserver(KVObserver):
    """Keeps the keys of layer 0: [tokens, heads, channels]."""

    keys: tuple[torch.Tensor, ...] = ()

    def observe(self, layer: int, q: Any, k: Any, v: Any, mask: Any = None, **heads: int) -> None:
        super().observe(layer, q, k, v, mask, **heads)
        if layer == 0:
            self.keys += (k.detach().float()[... if mask is None else mask],)


def key_channels(run: Session) -> dict[str, list[float]]:
    """Largest |k| and its deviation, by channel (RoPE pair by pair) of layer 0's first head."""
    observer = KeyObserver(run.trainer.attention_shape)
    prompts = run.task.train_prompts(0, 64)
    run.trainer.observe_kv(prompts_batch(run.task, prompts), observer)
    k = torch.cat(observer.keys)[:, 0]
    pairs = k.view(len(k), 2, -1).transpose(1, 2).flatten(1)
    return {"amax": pairs.abs().amax(0).tolist(), "deviation": pairs.std(0).tolist()}


def row(study: Study) -> dict[str, Any]:
    """The numbers of an arm that has ended; None where a BF16 cache has none.

    Means over steps; but of K's and V's elements clipped and lost to 0, the highest share.
    """
    lines = study.folder.metrics()
    heldout, k3 = series(lines, "reward/heldout")[1], series(lines, "rollout_corr/k3_kl")[1]
    clipped = max(shares(lines, "kv_saturation/"), default=(None, None))
    lost = max(shares(lines, "kv_underflow/"), default=(None, None))
    scales = [key for key in lines[0] if key.startswith("kv_scale/") and key[-1] in "kv"]
    return dict(zip(("model", "arm"), study.names, strict=True)) | {
        "seed": study.seed,
        "heldout_start": heldout[0],
        "heldout_end": heldout[-1],
        "k3": fmean(k3),
        "k3_last_quarter": fmean(k3[-max(1, len(k3) // 4) :]),
        "exp_abs_diff": fmean(series(lines, "rollout_corr/token_mult_prob_error")[1]),
        "clipped": clipped[0],
        "clipped_in": clipped[1] if clipped[0] else None,
        "lost": lost[0],
        "lost_in": lost[1] if lost[0] else None,
        "changes_of_k_and_v": sum(a[x] != b[x] for a, b in pairwise(lines) for x in scales),
        "kv_tokens": int(lines[0]["kv/cache_tokens"]),
    }


def series(lines: list[Metrics], key: str) -> tuple[list[float], list[float]]:
    """The steps that have ``key``, and its values."""
    found = [(float(line["step"]), float(line[key])) for line in lines if key in line]
    return [step for step, _ in found], [value for _, value in found]


def shares(lines: list[Metrics], kind: str) -> list[tuple[float, str]]:
    """The highest share of the elements of any K or V in each step, and the layer; not the last."""
    keys = [key for key in lines[0] if key.startswith(kind) and key[-1] in "kv"]
    counted = lines[:-1] if keys else []
    return [max((float(line[key]), key.removeprefix(kind)) for key in keys) for line in counted]


def table(rows: list[dict[str, Any]]) -> Table:
    """The numbers of one model and seed, a column for each arm."""
    made = Table(f"{rows[0]['model']}, {rows[0]['seed']}", *(row["arm"] for row in rows))
    for key in list(rows[0])[3:]:
        values = ("-" if row[key] is None else row[key] for row in rows)
        made.add_row(key, *(f"{x:.4g}" if isinstance(x, float) else str(x) for x in values))
    return made


def picture(studies: list[Study]) -> Figure:
    """Reward, mismatch, what the scales clip and lose, K by channel; a column for each model."""
    models = list(dict.fromkeys(study.names[0] for study in studies))
    with rc_context(STYLE):
        figure = Figure(figsize=(5.4 * len(models), 13), layout="constrained")
        grid = figure.subplots(4, len(models), squeeze=False, sharey="row")
        for model, axes in zip(models, grid.T.tolist(), strict=True):
            chosen = [study for study in studies if study.names[0] == model]
            for study in chosen:
                draw_run(axes, study)
            draw_channels(axes[3], chosen[0].folder.path / "key_channels.json")
            axes[0].set_title(f"{model}\nReward: held-out (dots), train (thin)")
        legend = grid[0, 0].get_legend_handles_labels()
        figure.legend(*legend, loc="outside upper center", ncols=len(ARMS), fontsize=11)
    return figure


def draw_run(axes: list[Axes], study: Study) -> None:
    """One arm's lines in the three panels over steps; thinner than those below it."""
    lines, arm = study.folder.metrics(), ARMS.index(study.arm)
    style: dict[str, Any] = {"color": COLOURS[arm], "linewidth": 3.6 - 0.6 * arm}
    label = study.names[1] if study.seed == 0 else None
    axes[0].plot(*series(lines, "reward/train"), color=COLOURS[arm], linewidth=0.8, alpha=0.5)
    axes[0].plot(*series(lines, "reward/heldout"), marker="o", label=label, **style)
    axes[0].set(xlabel="step", ylim=(0, None))
    axes[1].plot(*series(lines, "rollout_corr/k3_kl"), **style)
    axes[1].set(xlabel="step", yscale="log", title="Mismatch KL of rollout and trainer (k3, nats)")
    for kind, dashes in (("kv_saturation/", "-"), ("kv_underflow/", ":")):
        axes[2].plot([share for share, _ in shares(lines, kind)], linestyle=dashes, **style)
    axes[2].set_title("Of K or V at most: clipped (solid), lost to 0 (dotted)")
    axes[2].set_yscale("symlog", linthresh=1e-6)


def draw_channels(axes: Axes, path: Path) -> None:
    """K of one head by channel, beside the distance of E4M3's codes there."""
    channels = json.loads(path.read_text())
    amax = torch.tensor(channels["amax"])
    codes = torch.exp2(torch.floor(torch.log2(amax)) - 3)  # 3 bits of mantissa
    axes.plot(amax, color=BLUE, marker=".", linewidth=0.8, label="largest |k|")
    axes.plot(codes, color=VERMILION, drawstyle="steps-mid", label="distance of E4M3's codes at it")
    axes.plot(channels["deviation"], color=GREEN, marker=".", linewidth=0.8, label="deviation of k")
    axes.set(yscale="log", ylim=(1e-2, 3e3), title="K of layer 0, head 0, before the first step")
    axes.set_xlabel("channel, from RoPE's fastest pair to its slowest")
    axes.legend(loc="upper left")


@app.command(epilog=EXAMPLES)
def main(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
    models: Annotated[list[Model], typer.Option(help="One --models for each.")] = MODELS,
    arms: Annotated[
        list[Arm],
        typer.Option(help="BF16 KV cache, or FP8 with scales 1.0, of version 0, stale, or fresh."),
    ] = ARMS,
    steps: Annotated[int, typer.Option(min=1, help="RL steps of each arm.")] = 60,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm, with seeds 0, 1, ...")] = 1,
    stale: Annotated[int, typer.Option(min=1, help="By how many steps stale is late.")] = 10,
    outlier: Annotated[float, typer.Option(min=1, help="Size S of the planted outliers.")] = 150.0,
    out: Annotated[Path, typer.Option(help="Folder of the study.")] = Path("runs/kv-scales"),
) -> None:
    """Compare KV-cache scales on the real RL loop, some three minutes an arm on two cores.

    KEY=VALUE replaces a value of grpo.yaml. Ends with a table, and result.json and kv_scales.png in
    the study's folder. After a kill, the same command goes on, from the start of the arm that ran.
    """
    studies = [
        Study(model, arm, seed, steps, stale, outlier, out, tuple(overrides or ()))
        for model, arm, seed in product(models, arms, range(seeds))
    ]
    command, console = shlex.join(["python", *sys.argv]), Console()
    try:
        left = [study for study in studies if not study.ended()]
        out.mkdir(parents=True, exist_ok=True)
        with RunDir(out).locked():
            for number, study in enumerate(left, start=1):
                console.rule(f"arm {number} of {len(left)}: {study.folder.path}")
                study.run(command)
            rows = [row(study) for study in studies]
            RunDir(out).write_result({"command": command, "arms": rows})
            picture(studies).savefig(out / "kv_scales.png", dpi=130)
    except (ConfigError, RunDirError) as error:
        typer.echo(f"kv_scales: {error}", err=True)
        raise typer.Exit(2) from error
    for kind in dict.fromkeys((row["model"], row["seed"]) for row in rows):
        console.print(table([row for row in rows if (row["model"], row["seed"]) == kind]))
    typer.echo(str(out))


if __name__ == "__main__":
    app()
