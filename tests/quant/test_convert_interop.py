"""transformers loads a converted checkpoint, and reads the same values from it as we do.

In one case it does not: where rows do not fill whole blocks (DeepSeek-V3's kv_a_proj_with_mqa),
transformers 5.19 dequantizes with blocks of another size, or fails; there the linear is kept.
"""

import pytest
import torch

from fp8rl.quant.convert import convert_checkpoint
from fp8rl.quant.convert_plan import ConvertOptions

from .checkpoint_files import config_of, load, random_tensors, save

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

CASES = {
    "llama with biases": ConvertOptions(),
    "qwen3": ConvertOptions(),
    "qwen3-moe": ConvertOptions(keep_last_layers=1),
    "mixtral": ConvertOptions(keep_first_layers=1),
    "deepseek-v3": ConvertOptions(keep_patterns=("*_a_proj*",)),
}


@pytest.mark.parametrize("model", CASES)
def test_transformers_dequantizes_to_our_values(model, tmp_path):
    config = config_of(model)
    source = save(tmp_path / "source", config, random_tensors(config), shards=2)
    convert_checkpoint(source, tmp_path / "fp8", CASES[model])
    convert_checkpoint(tmp_path / "fp8", tmp_path / "back", ConvertOptions(to="bf16"))
    dequantize = transformers.FineGrainedFP8Config(dequantize=True)
    found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", dtype=torch.bfloat16, quantization_config=dequantize
    ).state_dict()
    ours = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", dtype=torch.bfloat16
    ).state_dict()
    assert found.keys() == ours.keys()
    assert len(found) >= 20
    for name, tensor in found.items():
        assert torch.equal(tensor, ours[name]), name
    linear = "model.layers.1.self_attn.o_proj.weight"
    assert torch.equal(found[linear], load(tmp_path / "back")[linear])
    assert not torch.equal(found[linear], load(source)[linear])
