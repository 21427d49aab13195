"""The density bench counts what differs, agrees with theory, and weighs what would be sent."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fp8rl.bench import density as bench
from fp8rl.bench.density_count import ALL, Counts, Held, by_kind, compare, kind_of
from fp8rl.bench.density_loop import SETTLING, LoopStep, measure_loop
from fp8rl.bench.density_report import print_result, save_picture
from fp8rl.bench.density_simulated import measure_from_checkpoint, measure_settled
from fp8rl.bench.density_theory import Expected, bf16_spacing, fp8_spacing
from fp8rl.bench.result import BenchResult
from fp8rl.config.file import parse_config
from fp8rl.config.run import RunConfig
from fp8rl.run_dir import RunDir
from tests.fp8rl.run_helpers import TINY

SIDE = 512


def test_what_differs_is_counted_by_hand() -> None:
    """Blocks of amax 448 and 3.5: scales 1 and 2^-7; three values move, one across a binade."""
    before = torch.full((128, 256), 2.0)
    before[0, 0], before[0, 128:] = 448.0, 3.5
    after = before.clone()
    after[1, 1] = 2.25  # the next code, and 16 BF16 steps
    after[2, 2] = 2.02  # BF16 alone: one and a half steps
    after[3, 200] = 3.52  # the second block's amax crosses 448 * 2^-7
    held = Held.of(before, quantized=True, last=None)
    found = compare(held, Held.of(after, quantized=True, last=held))
    assert (found.elements, found.codes, found.scales) == (128 * 256, 128 * 256, 2)
    assert found.elements_changed == 3
    assert (found.scales_changed, found.sticky_scales_changed) == (1, 1)
    assert found.codes_changed == 1 + 128 * 128
    back = Held.of(before, quantized=True, last=Held.of(after, quantized=True, last=held))
    again = compare(Held.of(after, quantized=True, last=held), back)
    assert (again.scales_changed, again.sticky_scales_changed) == (1, 0)
    assert (again.codes_changed, again.sticky_codes_changed) == (1 + 128 * 128, 2)
    assert 0 < again.sticky_delta < again.fp8_delta < again.bf16_bytes == 2 * 128 * 256


def test_what_does_not_change_weighs_nothing_and_what_is_not_quantized_weighs_as_in_bf16() -> None:
    values = torch.arange(100.0)
    held = Held.of(values, quantized=False, last=None)
    assert compare(held, held) == Counts(elements=100, bf16_bytes=200)
    found = compare(held, Held.of(values + 1, quantized=False, last=held))
    assert found.elements_changed == 100
    assert found.bf16_delta == found.fp8_delta == found.sticky_delta > 0
    assert (found.codes, found.shares()["codes_changed"]) == (0, None)


def test_tensors_are_added_up_by_kind() -> None:
    names = {
        "model.embed_tokens.weight": "embedding",
        "model.layers.0.self_attn.q_proj.weight": "attention",
        "model.layers.0.self_attn.q_norm.weight": "norms",
        "model.layers.0.post_attention_layernorm.weight": "norms",
        "model.layers.0.mlp.down_proj.weight": "MLP",
        "lm_head.weight": "head",
        "decoder.layers.0.self_attention.linear_qkv.weight": "attention",
        "embedding.word_embeddings.weight": "embedding",
        "output_layer.weight": "head",
    }
    assert {name: kind_of(name) for name in names} == names
    found = by_kind((name, Counts(elements=1, codes=2)) for name in names)
    assert {kind: c.elements for kind, c in found.items()} == {
        **{"norms": 2, "embedding": 2, "head": 2, "MLP": 1, "attention": 2, ALL: 9}
    }


def test_spacings_are_the_distance_to_the_next_stored_value() -> None:
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    x[0, 0] = 0.0
    bits = x.bfloat16().view(torch.int16)
    above = (bits + 1).view(torch.bfloat16).float() - x.bfloat16().float()
    inside = (x.abs().log2() % 1 > 0.01) & (x.abs().log2() % 1 < 0.98) & (x != 0)
    assert torch.equal(bf16_spacing(x)[inside], above.abs()[inside])
    held = Held.of(x.bfloat16(), quantized=True, last=None)
    assert held.fresh is not None
    scale = held.fresh.scale_inv.repeat_interleave(128, 0).repeat_interleave(128, 1)
    codes = held.fresh.data.view(torch.uint8)
    larger = (codes + 1).view(torch.float8_e4m3fn).float() * scale
    apart = (larger - held.fresh.data.float() * scale).abs()
    inside &= ((x / scale).abs().log2() % 1 < 0.9) & (codes & 0x7F < 0x7E)
    assert torch.equal(fp8_spacing(x)[inside], apart[inside])


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    return bench.bench_density(RunConfig(), 0, tmp_path_factory.mktemp("bench"), side=SIDE)


def test_count_and_theory_agree_on_gaussian_masters(simulated: BenchResult) -> None:
    rows = [r for r in simulated.rows if r["start"] == "settled"]
    assert [(r["sigma"], r["rate"]) for r in rows] == [
        (sigma, rate) for sigma in (0.02, 0.01) for rate in bench.RATES
    ]
    for row in rows:
        assert row["update"] == pytest.approx(0.65, rel=0.01)
        assert row["elements_changed"] == pytest.approx(row["elements_expected"], rel=0.03)
        assert row["codes_changed"] == pytest.approx(row["codes_expected"], rel=0.06)
        assert 7 < row["elements_changed"] / row["codes_changed"] < 13
    assert 0.0025 < rows[0]["codes_changed"] < 0.0029


def test_a_tenth_of_the_rate_on_a_tenth_of_the_weights_changes_as_much() -> None:
    """Only the ratio of update to weight counts."""
    one = {s.sigma: s.counts.codes_changed for s in measure_settled([1e-6], 1, SIDE)}
    two = {s.sigma: s.counts.codes_changed for s in measure_settled([2e-6], 1, SIDE)}
    assert one[0.01] == pytest.approx(two[0.02], rel=0.1)


def test_masters_that_are_bf16_numbers_move_less_in_bf16_and_more_in_fp8_of_their_own() -> None:
    steps = list(measure_from_checkpoint(1e-6, (1, 20), SIDE))
    assert [(s.number, s.quantized) for s in steps] == [
        *((1, "export"), (1, "master"), (20, "export"), (20, "master"))
    ]
    codes = {(s.number, s.quantized): s.counts.codes_changed / s.expected.codes for s in steps}
    assert codes[1, "export"] < 0.7 and codes[1, "master"] > 10
    assert codes[1, "export"] < codes[20, "export"] < 1
    assert 1 < codes[20, "master"] < 0.5 * codes[1, "master"]
    assert steps[0].counts.elements_changed < 0.4 * steps[0].expected.elements


def loop_steps() -> list[LoopStep]:
    """Steps as the loop would measure them: ten times the rate, ten times the changes."""
    held = Held.of(torch.ones(128, 128), quantized=True, last=None)
    steps = []
    for rate in bench.RATES:
        after = torch.ones(128, 128)
        after.view(-1)[: int(rate * 1e9)] = 1.5
        counts = compare(held, Held.of(after, quantized=True, last=held))
        plain = dataclasses.replace(counts, codes=0, scales=0)
        expected = Expected(rate * 1e9, rate * 1e9, rate * 1e4)
        linears, others = ("MLP", "attention", ALL), ("norms", "embedding", "head")
        steps.append(
            LoopStep(
                rate,
                dict.fromkeys(others, plain) | dict.fromkeys(linears, counts),
                dict.fromkeys(others, expected._replace(codes=None))
                | dict.fromkeys(linears, expected),
            )
        )
    return steps


def test_the_result_is_written_printed_and_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "measure_loop", lambda *_: loop_steps())
    result = bench.bench_density(RunConfig(), 1, tmp_path, side=128)
    result.write(tmp_path)
    found = json.loads((tmp_path / "result.json").read_text())
    assert all(set(r) == {"median", "min", "max", "goal"} for r in found["ratios"].values())
    assert [r["goal"] for r in found["ratios"].values() if r["goal"]] == [400.0]
    loop = {(r["rate"], r["kind"]): r for r in found["rows"] if r["part"] == "loop"}
    assert loop[1e-6, ALL]["elements_changed"] == 1000 / 128**2
    assert loop[1e-5, "head"]["codes_changed"] is None
    console = Console(width=200, record=True)
    print_result(result, console)
    text = console.export_text()
    assert all(name in text for name in (*found["ratios"], "attention", "step 100 from BF16"))
    save_picture(result, tmp_path / "density.png")
    assert (tmp_path / "density.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_the_loop_takes_the_steps_of_a_run_at_each_rate(tmp_path: Path) -> None:
    config = parse_config(TINY)
    steps = list(measure_loop(config, (1e-6, 1e-5), 2, tmp_path / "loop"))
    assert [s.rate for s in steps] == [1e-6, 1e-6, 1e-5, 1e-5]
    assert len(RunDir.open(tmp_path / "loop").metrics()) == SETTLING + 4
    for step in steps:
        counts, expected = step.counts[ALL], step.expected[ALL]
        assert counts.codes == sum(step.counts[k].codes for k in ("attention", "MLP"))
        assert 0.05 < expected.update / counts.elements / step.rate < 1.0
        assert counts.elements_changed == pytest.approx(expected.elements, rel=0.1)
        assert counts.codes_changed == pytest.approx(expected.codes, rel=0.1)
    assert steps[2].counts[ALL].codes_changed > 5 * steps[0].counts[ALL].codes_changed
