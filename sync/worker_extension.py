"""What vLLM's workers answer beside vLLM's own calls: ``worker_extension_cls`` of an engine.

vLLM lets a client call a worker's methods by name alone, so this one is put among them. A server is
started with ``--worker-extension-cls fp8rl.sync.worker_extension.WorkerExtension``.
"""

from __future__ import annotations

from typing import Any

EXTENSION = f"{__name__}.WorkerExtension"


class WorkerExtension:
    """Mixed into vLLM's worker class by vLLM."""

    weight_transfer_engine: Any

    def fp8rl_report(self) -> dict[str, Any]:
        """What the worker's receiver holds, and says of the last call (``Receiver.report``)."""
        report: dict[str, Any] = self.weight_transfer_engine.report()
        return report
