"""Motion: from a trainer's weights to an engine that has proven what it holds.

    with RolloutEngine(...) as engine, Publisher(plan, engine) as publisher:
        publisher.publish(source, version=7, kv_scales=scales)

The trainer's side (this file's names) needs torch alone; the engine's side (``receiver.py``,
``transaction.py``, ``engine_*.py``) runs inside vLLM's workers, which load it through
``plugin.py``.
"""

from fp8rl.sync.engines import SyncClient
from fp8rl.sync.errors import (
    BaseMismatchError,
    CorruptTensorError,
    DeltaError,
    EngineCallError,
    EnginesError,
    ManifestError,
    NotIntroducedError,
    PublisherError,
    ReadBackError,
    SegmentError,
    SourceError,
    TransportError,
    UnsupportedAttentionError,
    UpdateRefusedError,
)
from fp8rl.sync.file_follower import FileFollower
from fp8rl.sync.files import Files
from fp8rl.sync.local_shard import LocalShard
from fp8rl.sync.megatron import MegatronSource
from fp8rl.sync.megatron_load import load_hf_checkpoint
from fp8rl.sync.publisher import Publisher, SyncReport
from fp8rl.sync.qkv_hugging_face import HuggingFaceQKV
from fp8rl.sync.qkv_megatron import MegatronQKV
from fp8rl.sync.qkv_source import QKVSource, QKVWatch
from fp8rl.sync.sharded_source import ShardedSource
from fp8rl.sync.source import IterableSource, TensorMeta, WeightSource, encoded
from fp8rl.sync.transports import Broadcast, SharedMemory
from fp8rl.sync.vllm_engines import HTTPEngine, InProcessEngine

__all__ = [
    "BaseMismatchError",
    "Broadcast",
    "CorruptTensorError",
    "DeltaError",
    "EngineCallError",
    "EnginesError",
    "FileFollower",
    "Files",
    "HTTPEngine",
    "HuggingFaceQKV",
    "InProcessEngine",
    "IterableSource",
    "LocalShard",
    "ManifestError",
    "MegatronQKV",
    "MegatronSource",
    "NotIntroducedError",
    "Publisher",
    "PublisherError",
    "QKVSource",
    "QKVWatch",
    "ReadBackError",
    "SegmentError",
    "ShardedSource",
    "SharedMemory",
    "SourceError",
    "SyncClient",
    "SyncReport",
    "TensorMeta",
    "TransportError",
    "UnsupportedAttentionError",
    "UpdateRefusedError",
    "WeightSource",
    "encoded",
    "load_hf_checkpoint",
]
