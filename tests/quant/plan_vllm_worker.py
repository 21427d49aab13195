"""Run in a process of its own: build vLLM's real models and print what each of their layers is.

Usage: python -m tests.quant.plan_vllm_worker FOLDER. Reads config.json of each case in the JSON
object on standard input; prints one JSON object, case -> module -> [quantized, Hugging Face parts].
Models lie on the meta device: only their construction is of interest.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"


def main(folder: Path, cases: dict[str, Any]) -> None:
    from vllm.config import set_current_vllm_config

    found = {}
    for case, config in cases.items():
        path = folder / case
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
        vllm_config = engine_config(path)
        with set_current_vllm_config(vllm_config):
            join_world_of_one(folder)
            found[case] = layers(vllm_config)
    print(json.dumps(found))


def engine_config(path: Path) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=str(path),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=64,
    )
    return arguments.create_engine_config()


def join_world_of_one(folder: Path) -> None:
    """Groups of one process, made anew: vLLM has one for experts only where a model has experts."""
    from vllm.distributed import (
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )

    init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
    destroy_model_parallel()
    initialize_model_parallel(1)


def layers(vllm_config: Any) -> dict[str, tuple[bool, list[str]]]:
    """Module -> whether it computes in FP8, and the linears of the checkpoint it is made of."""
    import torch
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod, Fp8MoEMethod
    from vllm.model_executor.model_loader.utils import initialize_model

    with torch.device("meta"):
        model = initialize_model(vllm_config)
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, RoutedExperts):
            whole = prefix.removesuffix(".routed_experts")
            found[whole] = (isinstance(module.quant_method, Fp8MoEMethod), [whole])
        elif isinstance(module, LinearBase):
            parent, _, leaf = prefix.rpartition(".")
            parts = model.packed_modules_mapping.get(leaf, [leaf])
            if leaf == "gate_up_proj":  # not in Qwen3-MoE's mapping unless it has mlp_only_layers
                parts = ["gate_proj", "up_proj"]
            names = [f"{parent}.{part}" for part in parts]
            found[prefix] = (isinstance(module.quant_method, Fp8LinearMethod), names)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.load(sys.stdin))
