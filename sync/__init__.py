"""Motion: from a trainer's weights to an engine that has proven what it holds.

    with RolloutEngine(...) as engine, Publisher(plan, engine) as publisher:
        publisher.publish(source, version=7, kv_scales=scales)

The trainer's side (this file's names) needs torch alone; the engine's side (``receiver.py``,
``engine_state.py``, ``engine_scales.py``) runs inside vLLM's workers, which load it through
``plugin.py``.
"""

from fp8rl.sync.errors import (
    CorruptTensorError,
    DeltaError,
    ManifestError,
    ReadBackError,
    SegmentError,
    SourceError,
    UnsupportedAttentionError,
)
from fp8rl.sync.megatron import MegatronSource
from fp8rl.sync.megatron_load import load_hf_checkpoint
from fp8rl.sync.publisher import Publisher, SyncClient, SyncReport
from fp8rl.sync.qkv_hugging_face import HuggingFaceQKV
from fp8rl.sync.qkv_megatron import MegatronQKV
from fp8rl.sync.qkv_source import QKVSource, QKVWatch
from fp8rl.sync.source import IterableSource, TensorMeta, WeightSource

__all__ = [
    "CorruptTensorError",
    "DeltaError",
    "HuggingFaceQKV",
    "IterableSource",
    "ManifestError",
    "MegatronQKV",
    "MegatronSource",
    "Publisher",
    "QKVSource",
    "QKVWatch",
    "ReadBackError",
    "SegmentError",
    "SourceError",
    "SyncClient",
    "SyncReport",
    "TensorMeta",
    "UnsupportedAttentionError",
    "WeightSource",
    "load_hf_checkpoint",
]
