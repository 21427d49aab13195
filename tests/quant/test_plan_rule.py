"""An architecture that nobody described is planned by rule, and every reason says so."""

import pytest

from fp8rl.quant import QuantPlan, QuantPlanError

from .plan_models import TINY

BLOCK = "transformer.blocks.0"
STRANGE = {
    "transformer.wte.weight": (512, 256),
    f"{BLOCK}.ln_1.weight": (256,),
    f"{BLOCK}.mixer.in_proj.weight": (512, 256),
    f"{BLOCK}.mixer.in_proj.bias": (512,),
    f"{BLOCK}.mixer.conv.weight": (512, 1, 4),
    f"{BLOCK}.mixer.A_log": (128, 128),
    f"{BLOCK}.moe.router.weight": (128, 256),
    f"{BLOCK}.moe.experts.down_proj": (4, 256, 512),
    "transformer.norm_f.weight": (256,),
    "vision_tower.blocks.0.mlp.fc1.weight": (512, 256),
    "output.weight": (512, 256),
}


def quantized(plan: QuantPlan) -> list[str]:
    return [e.name for e in plan.entries if e.quantized]


@pytest.mark.parametrize("model", [m for m in TINY if "deepseek" not in m])
def test_the_rule_finds_what_the_table_says_of_every_known_model(model):
    known = QuantPlan.from_hf_config(TINY[model])
    guessed = QuantPlan.from_tensors({e.name: e.shape for e in known.entries})
    assert guessed.by_rule and not known.by_rule
    assert quantized(guessed) == quantized(known)
    assert set(guessed.kept_modules) == set(known.kept_modules)


def test_the_rule_does_not_guess_that_ragged_rows_can_be_served():
    known = QuantPlan.from_hf_config(TINY["deepseek-v3"])
    shapes = {e.name: e.shape for e in known.entries}
    with pytest.raises(QuantPlanError, match=r"kv_a_proj_with_mqa.weight \(160, 256\)"):
        QuantPlan.from_tensors(shapes)
    guessed = QuantPlan.from_tensors(shapes, unfit="keep")
    missing = {name.split(".")[-2] for name in set(quantized(known)) - set(quantized(guessed))}
    assert missing == {"q_a_proj", "kv_a_proj_with_mqa"}


def test_only_matrices_of_decoder_layers_are_quantized_and_every_reason_says_by_rule():
    plan = QuantPlan.from_tensors(STRANGE)
    assert quantized(plan) == [f"{BLOCK}.mixer.in_proj.weight"]
    assert [e.name for e in plan.entries] == list(STRANGE)
    for entry in plan.entries:
        assert entry.reason.startswith("by rule, the architecture is not known: ")
    assert plan.entry(f"{BLOCK}.moe.router.weight").reason.endswith("never quantized: router")
    assert plan.entry(f"{BLOCK}.mixer.A_log").reason.endswith("of a numbered decoder layer")
    assert plan.entry("output.weight").reason.endswith("never quantized: head")


def test_the_engine_is_told_of_every_matrix_that_stays():
    kept = QuantPlan.from_tensors(STRANGE).quantization_config()["modules_to_not_convert"]
    assert {"vision_tower.blocks.0.mlp.fc1", "output", "lm_head"} < set(kept)
    assert {f"{BLOCK}.moe.router", f"{BLOCK}.moe.experts"} < set(kept)
    assert not {"transformer.wte", f"{BLOCK}.ln_1", f"{BLOCK}.mixer.in_proj"} & set(kept)


@pytest.mark.parametrize(
    ("shape", "ranks", "fits"),
    [
        ((512, 256), 2, True),
        ((512, 256), 4, False),  # 64 columns, if it is the columns that are split
        ((192, 256), 1, False),
        ((384, 384), 3, True),
        ((256, 256), 3, False),  # does not divide
    ],
)
def test_both_dimensions_must_fill_blocks_on_every_rank(shape, ranks, fits):
    shapes = {"h.0.fc.weight": shape}
    plan = QuantPlan.from_tensors(shapes, tensor_parallel=ranks, unfit="keep")
    assert plan.is_quantized("h.0.fc.weight") == fits
    if not fits:
        with pytest.raises(QuantPlanError, match=r"h\.0\.fc\.weight"):
            QuantPlan.from_tensors(shapes, tensor_parallel=ranks)


def test_layers_are_kept_by_their_number():
    shapes = {f"h.{i}.fc.weight": (128, 128) for i in range(4)}
    plan = QuantPlan.from_tensors(shapes, keep_first_layers=1, keep_last_layers=2)
    assert quantized(plan) == ["h.1.fc.weight"]


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(QuantPlanError, match="none of these 1 tensors"):
        QuantPlan.from_tensors({"weight": (128, 128)})
