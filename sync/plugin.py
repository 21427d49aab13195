"""The ``vllm.general_plugins`` entry point: makes known to vLLM what fp8rl adds to it.

    BACKEND    the weight-transfer backend that receives and proves updates
    W8A8       on a CPU, the quantization method that computes like a GPU (``engine_w8a8.py``)
    W8A16      on a CPU without AMX, vLLM's own FP8 kernels (``engine_avx512.py``)

vLLM calls ``register`` in the front end, in the engine core and in every worker. It swallows a
plugin that fails to load, so the receiver is also checked for by name on every worker
(``fp8rl doctor``, and the engine at start).
"""

from __future__ import annotations

BACKEND = "fp8rl"
W8A8 = "fp8rl-w8a8"
W8A16 = "fp8rl-w8a16"
RECEIVER = ("fp8rl.sync.receiver", "Receiver")


def register() -> None:
    """Register them; calling it again changes nothing."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, *RECEIVER)
    if current_platform.is_cpu():
        from fp8rl.sync import engine_avx512, engine_w8a8

        engine_avx512.register()
        engine_w8a8.register()
