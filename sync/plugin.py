"""The ``vllm.general_plugins`` entry point: makes fp8rl's weight-transfer backend known to vLLM.

vLLM calls ``register`` in the front end, in the engine core and in every worker. It swallows a
plugin that fails to load, so the receiver is also checked for by name on every worker
(``fp8rl doctor``, and the engine at start).
"""

from __future__ import annotations

BACKEND = "fp8rl"
RECEIVER = ("fp8rl.sync.receiver", "Receiver")


def register() -> None:
    """Register the receiver; calling it again changes nothing."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, *RECEIVER)
