"""Run in a process of its own: KV scales in a live engine with BF16 weights and an FP8 cache.

Usage: python -m tests.sync.kv_application_worker FOLDER. Prints one JSON object: case -> what was
seen. The engine's own process is left out, so that the live model can be reached.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from fp8rl.quant import KVScales
from tests import helpers

PROMPT = [5, 6, 7, 8]
SAMPLING = {"max_tokens": 2, "temperature": 0.0, "n": 1}


class Bench:
    """A live engine, the way to it, and what was seen."""

    def __init__(self, folder: Path) -> None:
        from fp8rl.engine.server import EngineServer
        from fp8rl.sync.publisher import Publisher

        settings = helpers.settings("kv-only")
        self.server = EngineServer(settings.llm_arguments(folder))
        self.publisher = Publisher(settings.plan(), self.server, kv_layers=helpers.LAYERS)
        self.version = -1
        self.seen: dict[str, Any] = {}

    def worker(self, do: Callable[[Any], Any]) -> Any:
        """Run ``do(receiver)`` where the model lives."""
        return self.server._llm.collective_rpc(lambda w: do(w.weight_transfer_engine))[0]

    def model(self, do: Callable[[Any], Any]) -> Any:
        return self.worker(lambda receiver: do(receiver.model))

    def publish(self, factor: float, kv_scales: Any = None) -> KVScales:
        """Publish a new version; its scales unless others are given."""
        self.version += 1
        scales = helpers.scales(self.version, factor)
        self.publisher.publish(
            helpers.source(self.version), version=self.version, kv_scales=kv_scales or scales
        )
        return scales

    def state(self) -> dict[str, Any]:
        """What the engine says of its scales, and whether it serves."""
        return {
            "held": self.server.kv_state()[0],
            "problems": self.worker(lambda receiver: receiver.scale_problems()),
            "served": error_of(self.generate),
        }

    def generate(self) -> None:
        ticket = self.server.submit([PROMPT], self.version, SAMPLING, [0])
        while self.server.runs(ticket):
            self.server.step()
        self.server.collect(ticket)


def main(folder: Path) -> None:
    from fp8rl.engine.channel import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    bench = Bench(folder)
    before_any_publish(bench)
    updates(bench)
    resets(bench)
    scales_that_follow(bench)
    refusals(bench)
    bench.publisher.close()
    print(json.dumps(bench.seen))


def before_any_publish(bench: Bench) -> None:
    bench.seen["before any publish"] = bench.state()
    bench.seen["observing outside of an update"] = error_of(
        lambda: bench.worker(lambda r: r.start_observation(True, False))
    )


def updates(bench: Bench) -> None:
    for case, factor in (("first publish", 1.0), ("second publish", 16.0)):
        scales = bench.publish(factor)
        bench.seen[case] = {"published": values(scales), **bench.state()}
    ones = KVScales.from_amax(
        torch.full((helpers.LAYERS, 3), 448.0), version=bench.version + 1, tokens=1
    )
    bench.publish(1.0, kv_scales=ones)
    bench.seen["a measured 1.0"] = {"published": values(ones), **bench.state()}


def resets(bench: Bench) -> None:
    """Everything that is known to set the scales to 1.0 behind our back."""
    scales = bench.publish(2.0)
    bench.model(set_derived)
    bench.model(lambda m: reload_as_vllm_does(m, bench.server))
    bench.seen["vLLM's own reload"] = bench.state()
    bench.seen["asleep"] = bench.worker(lambda r: r.slept(1)) or bench.state()
    bench.worker(lambda r: r.woke())
    bench.seen["awake"] = {
        "published": values(scales),
        **bench.state(),
        "derived": bench.model(derived),
    }
    bench.worker(lambda r: r.slept(2))
    bench.worker(lambda r: r.woke())
    bench.seen["awake without weights"] = bench.state()
    scales = bench.publish(1.0)
    bench.seen["published after that"] = {"published": values(scales), **bench.state()}


def scales_that_follow(bench: Bench) -> None:
    """The engine measures the weights just applied, in the midst of the update."""
    from fp8rl.sync.engine_state import differences

    before, mid = bench.version, {}

    def measure() -> KVScales:
        sent = helpers.weights(bench.version)
        mid["weights"] = bench.model(lambda m: differences(m, sent))
        mid["served"] = error_of(bench.generate)
        mid["held"] = bench.server.kv_state()[0]
        observation = bench.server.observe_kv([PROMPT], False)
        mid["tokens"] = max(max(row) for row in observation["tokens_seen"])
        return helpers.scales(bench.version, 4.0)

    bench.publish(4.0, kv_scales=measure)
    bench.seen["midway"] = {**mid, "published": values(helpers.scales(before, 1.0))}
    bench.seen["scales that follow"] = {
        "published": values(helpers.scales(bench.version, 4.0)),
        **bench.state(),
    }

    def fail() -> KVScales:
        raise RuntimeError("the calibration batch is empty")

    for case, measured in (
        ("a measurement that fails", fail),
        ("a measurement of other weights", lambda: helpers.scales(0)),
    ):
        last = values(helpers.scales(bench.version, 1.0 if "other" in case else 4.0))
        refused = error_of(lambda measured=measured: bench.publish(1.0, kv_scales=measured))
        bench.seen[case] = {"error": refused, "published": last, **bench.state()}
        bench.version -= 1
        bench.seen[case]["served before"] = error_of(bench.generate)
        bench.version += 1
        scales = bench.publish(1.0)
        bench.seen[f"healed after {case}"] = {"published": values(scales), **bench.state()}


def refusals(bench: Bench) -> None:
    """Engines whose scales cannot be set for certain, made from the live one."""
    from vllm.config import CompilationConfig, CUDAGraphMode
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    from fp8rl.sync.engine_scales import READS, refuse_unsupported

    class LatentAttention(torch.nn.Module, AttentionLayerBase):
        kv_cache_dtype = "fp8"
        get_attn_backend = get_kv_cache_spec = None

    def compiled(mode: str, **options: Any) -> Any:
        return CompilationConfig(cudagraph_mode=CUDAGraphMode[mode], **options)

    eager, full = compiled("NONE"), compiled("FULL_DECODE_ONLY")
    split = {"splitting_ops": CompilationConfig._attention_ops}
    unsplit = {"splitting_ops": ["vllm::all_reduce"]}
    backend = lambda name: backend_of(f"vllm.v1.attention.backends.{name}")  # noqa: E731
    cases: dict[str, tuple[Callable[[Any], Any], Any]] = {
        "as it is": (lambda a: changed(a), eager),
        "latent attention": (lambda a: changed(a, extra=LatentAttention()), eager),
        "scales of each token": (
            lambda a: changed(a, kv_cache_dtype="fp8_per_token_head"),
            eager,
        ),
        "another format": (lambda a: changed(a, kv_cache_dtype="fp8_e5m2"), eager),
        "scales of each head": (lambda a: changed(a, _k_scale=torch.ones(2)), eager),
        "no float mirror": (lambda a: changed(a, _v_scale_float=None), eager),
        "another layer's cache": (lambda a: changed(a, kv_sharing_target_layer_name="x"), eager),
        "floats in a full graph": (backend("flashinfer"), full),
        "floats in a piece of a graph": (backend("flashinfer"), compiled("PIECEWISE", **unsplit)),
        "floats between graphs": (backend("flashinfer"), compiled("PIECEWISE", **split)),
        "floats without graphs": (backend("flashinfer"), eager),
        "tensors in a full graph": (backend("flash_attn"), full),
        "an unknown backend": (backend_of("my_backends.sdpa"), eager),
    }

    def examine(model: Any) -> dict[str, str | None]:
        found = {}
        for case, (change, compilation) in cases.items():
            with ExitStack() as stack:
                for layer in model.model.layers:
                    stack.enter_context(change(layer.self_attn.attn))
                found[case] = error_of(
                    lambda compilation=compilation: refuse_unsupported(model, compilation)
                )
        return found

    bench.seen["refused at start"] = bench.model(examine)
    bench.seen["what backends read"] = {name: sorted(kinds) for name, kinds in READS.items()}


@contextmanager
def changed(layer: Any, **values: Any) -> Iterator[None]:
    """Set attributes of a layer for a while."""
    before = {name: getattr(layer, name) for name in values if hasattr(layer, name)}
    try:
        for name, value in values.items():
            setattr(layer, name, value)
        yield
    finally:
        for name in values:
            delattr(layer, name)
        for name, value in before.items():
            setattr(layer, name, value)


def backend_of(module: str) -> Callable[[Any], Any]:
    """Have a layer's backend say that it is implemented in that module."""

    @contextmanager
    def change(layer: Any) -> Iterator[None]:
        before = type(layer.impl)
        layer.impl.__class__ = type("Impl", (before,), {"__module__": module})
        yield
        layer.impl.__class__ = before

    return change


def reload_as_vllm_does(model: Any, server: Any) -> None:
    """vLLM's reload of the same weights, as ``reload_weights`` or a wake-up by others would do."""
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    initialize_layerwise_reload(model)
    model.load_weights(iter(helpers.weights(0).items()))
    finalize_layerwise_reload(model, server._llm.llm_engine.vllm_config.model_config)


def set_derived(model: Any) -> None:
    """What FlashInfer's layers carry after their first forward."""
    for layer in model.model.layers:
        layer.self_attn.attn.impl.bmm1_scale = layer.self_attn.attn.impl.bmm2_scale = 3.0
        layer.self_attn.attn._o_scale_float = 3.0


def derived(model: Any) -> list[Any]:
    attention = [layer.self_attn.attn for layer in model.model.layers]
    return [[a.impl.bmm1_scale, a.impl.bmm2_scale, a._o_scale_float] for a in attention]


def values(scales: KVScales) -> dict[str, float]:
    return {name: float(value) for name, value in scales.tensors().items()}


def error_of(do: Callable[[], Any]) -> str | None:
    """What ``do`` raises, or None."""
    try:
        do()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
