"""Where weights come from, and one way to take them: as a plan has them.

A source is a re-iterable stream of Hugging Face-named tensors. Its contract is that of vLLM's
``WeightSource`` (``metadata`` and iteration agree element for element; every iteration is a fresh
pass; ranks that share a tensor iterate in lockstep), stated here as a protocol so that a trainer
needs no vLLM installed.

    IterableSource(model.state_dict())               tensors that already lie here
    IterableSource(engine.get_per_tensor_param)      veRL's engines
    IterableSource(lambda: bridge.export_hf_weights(model))      Megatron-Bridge
    IterableSource(lambda: bridge.export_weights(model))         mbridge

What makes the pass is given, not the pass itself: a generator runs once, a source every step.

    for name, tensor in encoded(source, plan, to=[0]): ...

A sharded source encodes its shards where they lie (``sharded_source.py``). Another one's tensors
are whole when they get here: the destinations encode them, the other ranks only iterate, since that
is a collective of theirs. What stops a destination in between cannot be told to ranks that are in a
collective of the source's own; it runs through the rest of the pass first, and then all know.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, runtime_checkable

import torch
from torch import Tensor

from fp8rl.quant import FP32Source, QuantizedTensor, QuantPlan
from fp8rl.quant.tensor import FP8_DTYPE
from fp8rl.sync.encode import encode
from fp8rl.sync.errors import SourceError
from fp8rl.sync.rounded import arrived, moving_dtypes
from fp8rl.sync.trainer_ranks import TrainerRanks

HEAD: Final = "lm_head.weight"
EMBEDDING: Final = "model.embed_tokens.weight"
WRAPPERS: Final = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


@dataclass(frozen=True)
class TensorMeta:
    """Name, dtype and full (unsharded, Hugging Face) shape of one tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@runtime_checkable
class WeightSource(Protocol):
    """Anything that yields the policy's weights under Hugging Face names."""

    def metadata(self) -> list[TensorMeta]:
        """What iteration will yield, in order, without moving data."""
        ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield ``(name, full tensor)``; a collective where the trainer is sharded."""
        ...


@runtime_checkable
class EncodedSource(WeightSource, Protocol):
    """A source that encodes its weights itself, in step with all ``ranks``."""

    @property
    def ranks(self) -> TrainerRanks:
        """The trainer's ranks."""
        ...

    def encoded(
        self, plan: QuantPlan, *, to: Sequence[int], fp32_as: FP32Source | None = None
    ) -> Iterator[tuple[str, QuantizedTensor | Tensor]]:
        """As the function below."""
        ...


Whole = Tensor | QuantizedTensor
Named = Mapping[str, Whole] | Iterable[tuple[str, Whole]]


class IterableSource:
    """A source over any named tensors: a mapping, a list of pairs, or what makes a fresh pass.

    Names may have the prefixes that wrappers add (see `hugging_face_name`). DTensors are
    materialized as they are yielded (a collective of their mesh), and a `QuantizedTensor` passes.
    """

    def __init__(
        self,
        tensors: Named | Callable[[], Named | tuple[Named, None]],
        *,
        metadata: Sequence[TensorMeta] | None = None,
    ) -> None:
        """Remember where the tensors come from.

        Args:
            tensors: a mapping or a list of pairs (name, tensor), read anew in every pass; or a
                callable that returns one, or a new generator of pairs, each time. veRL's pair of
                a generator and the config of LoRA adapters will do, if there are no adapters.
            metadata: of what a callable yields, where it is known. Otherwise the first call of
                `metadata` runs the callable once through, and remembers.

        Raises:
            SourceError: `tensors` is a generator or another iterator, which runs once.
        """
        if isinstance(tensors, Iterator):
            raise SourceError(
                f"a {type(tensors).__name__} runs once and a source is iterated at every publish; "
                "pass what makes it: IterableSource(lambda: bridge.export_hf_weights(model))"
            )
        self._tensors = tensors
        self._metadata = None if metadata is None else list(metadata)

    def metadata(self) -> list[TensorMeta]:
        """Name, dtype and shape of every tensor, in order.

        Of a callable without given metadata, the first call makes a whole pass: a collective where
        the trainer is sharded.
        """
        if not callable(self._tensors):
            return [describe(name, tensor) for name, tensor in self._pass()]
        if self._metadata is None:
            self._metadata = [describe(name, tensor) for name, tensor in self._pass()]
        return list(self._metadata)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors themselves; nothing is copied but DTensors.

        Raises SourceError where a name comes twice, or this pass differs from the metadata.
        """
        pairs = self._pass()
        known = self._metadata
        for name, tensor in pairs if known is None else as_announced(known, pairs):
            full_tensor = getattr(tensor, "full_tensor", None)
            yield name, tensor if full_tensor is None else full_tensor()

    def _pass(self) -> Iterator[tuple[str, Any]]:
        """A fresh pass over the pairs, under their names in a checkpoint."""
        seen = set()
        for name, tensor in _pairs(self._tensors() if callable(self._tensors) else self._tensors):
            if not isinstance(tensor, Tensor | QuantizedTensor):
                raise SourceError(f"{name}: expected a tensor, found {type(tensor).__name__}")
            name = hugging_face_name(name)
            if name in seen:
                raise SourceError(f"the source yielded {name} twice")
            seen.add(name)
            yield name, tensor


def _pairs(found: object) -> Iterable[Any]:
    """The pairs in what a trainer's export returns."""
    if isinstance(found, tuple) and len(found) == 2 and not isinstance(found[0], tuple):
        found, adapters = found  # veRL: (generator, peft_config)
        if adapters is not None:
            raise SourceError(
                "the trainer exports LoRA adapters beside its weights, and an engine with FP8 "
                "weights takes whole ones; merge them (veRL: model.lora.merge=True)"
            )
    if isinstance(found, Mapping):
        return found.items()
    if not isinstance(found, Iterable):
        raise SourceError(
            f"expected pairs (name, tensor) or a mapping of them, found {type(found).__name__}"
        )
    return found


def hugging_face_name(name: str) -> str:
    """Return a parameter's name without what wrappers added to it.

    These are FSDP, activation checkpointing and torch.compile anywhere in a name, and DDP's
    `module.` in front.
    """
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def describe(name: str, tensor: Tensor | QuantizedTensor) -> TensorMeta:
    """Return name, dtype (E4M3 where it is quantized) and whole shape of a tensor."""
    dtype = FP8_DTYPE if isinstance(tensor, QuantizedTensor) else tensor.dtype
    return TensorMeta(name, dtype, tuple(tensor.shape))


def as_announced(
    metadata: Sequence[TensorMeta], pairs: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Pass pairs through; SourceError at the first that is not as the metadata says."""
    found = 0
    for name, tensor in pairs:
        announced = metadata[found] if found < len(metadata) else None
        if describe(name, tensor) != announced:
            raise SourceError(
                f"the source yielded {describe(name, tensor)} as number {found}, and announced "
                f"{announced or f'{len(metadata)} tensors'}; iteration and metadata must agree"
            )
        found += 1
        yield name, tensor
    if found < len(metadata):
        raise SourceError(
            f"the source yielded {found} of {len(metadata)} tensors and stopped before "
            f"{metadata[found].name!r}; every pass must be a fresh one (a callable must not return "
            "the same generator again)"
        )


def encoded(
    source: WeightSource, plan: QuantPlan, *, to: Sequence[int], fp32_as: FP32Source | None = None
) -> Generator[tuple[str, QuantizedTensor | Tensor], None, None]:
    """Yield every tensor as the plan has it, on the ranks `to`: a collective of all trainer ranks.

    Quantized weights are yielded as ``QuantizedTensor``, others in the plan's dtype, in order of
    the source's metadata. Elsewhere nothing is yielded, but the iterator must be run to its end. A
    destination that leaves its loop must close the iterator (``contextlib.closing``) for others to
    know. A head that the source yields and the plan, being tied, has not must equal the embedding.

    Args:
        source: any. plan: made from the config of the same model.
        to: destinations, as ranks of the source's group; of the default group for a source that
            has none. A process without torch.distributed is rank 0.
        fp32_as: what fp32 weights stand for, as in `quantize_blockwise`.

    Raises:
        SourceError: plan, metadata and what is yielded differ, or another rank broke off.
        NonFiniteWeightError: a tensor holds NaN or Inf.
        RankLostError: a rank ended.
    """
    if isinstance(source, EncodedSource):
        yield from source.encoded(plan, to=to, fp32_as=fp32_as)
        return
    ranks = TrainerRanks(None)
    with ranks.telling():
        metadata = source.metadata()
        refuse_destinations(to, ranks.size)
        dtypes = {meta.name: dtype for meta, dtype in planned(metadata, plan, fp32_as)}
        moving = dict(zip(dtypes, moving_dtypes(list(dtypes), plan), strict=True))
    ranks.agree()
    with ranks.telling():
        tensors = iter(source)
        pairs = as_announced(metadata, tensors)
        try:
            if ranks.rank in to:
                for name, tensor in pairs if HEAD in dtypes else without_head(pairs):
                    moved = encode(name, tensor, moving[name], fp32_as, plan.scale_format)
                    yield name, arrived(moved, dtypes[name])
        finally:
            for _ in tensors if ranks.size > 1 else ():
                pass
    ranks.agree()


def destinations(source: WeightSource, publishes: bool) -> list[int]:
    """Return the ranks that publish, asking all of them; rank 0 where none does."""
    ranks = source.ranks if isinstance(source, EncodedSource) else TrainerRanks(None)
    told = ranks.gather("publishes" if publishes else "takes part")
    return [rank for rank, said in enumerate(told) if said == "publishes"] or [0]


def refuse_destinations(to: Sequence[int], ranks: int) -> None:
    """Raise SourceError unless `to` are different ranks of a group of so many, at least one."""
    if not to or len(set(to)) < len(to) or not set(to) <= set(range(ranks)):
        raise SourceError(f"to must be ranks of a group of {ranks}, found {list(to)}")


def planned(
    metadata: Sequence[TensorMeta], plan: QuantPlan, fp32_as: FP32Source | None
) -> list[tuple[TensorMeta, torch.dtype]]:
    """Return what of a source is sent, and as what (`planned_dtypes`): all but a tied head."""
    tied = all(entry.name != HEAD for entry in plan.entries)
    sent = [meta for meta in metadata if not (tied and meta.name == HEAD)]
    return list(zip(sent, planned_dtypes(sent, plan, fp32_as), strict=True))


def planned_dtypes(
    metadata: Sequence[TensorMeta], plan: QuantPlan, fp32_as: FP32Source | None
) -> list[torch.dtype]:
    """Return the dtype in which each tensor is sent: E4M3 where the plan quantizes it.

    Raises SourceError where the source has other tensors or shapes than the plan, and for an fp32
    weight without `fp32_as`.
    """
    entries = {entry.name: entry for entry in plan.entries}
    found = {meta.name: meta for meta in metadata}
    for what, names in (
        ("the source lacks", [name for name in entries if name not in found]),
        ("the source has, and the plan not,", [name for name in found if name not in entries]),
    ):
        if names:
            raise SourceError(
                f"{what} {len(names)} tensor(s), the first {names[0]!r}; the plan must be made "
                "from the config of the model that the source yields"
            )
    for meta in metadata:
        entry = entries[meta.name]
        if meta.shape != entry.shape:
            raise SourceError(f"{meta.name}: shape {list(meta.shape)}, planned {list(entry.shape)}")
        if (entry.quantized or entry.rounded) and meta.dtype == torch.float32 and fp32_as is None:
            raise SourceError(
                f"{meta.name}: is fp32, and fp32_as is None; say fp32_as='master' to quantize "
                "these values or 'export' to round them to bf16 first: the two give different "
                "weights"
            )
    return [entries[meta.name].dtype for meta in metadata]


def without_head(pairs: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Leave out a tied head, once it has been seen to equal the embedding."""
    two: dict[str, Tensor] = {}
    for name, tensor in pairs:
        if name in (HEAD, EMBEDDING):
            two[name] = tensor
            if len(two) == 2 and not torch.equal(two[HEAD], two[EMBEDDING]):
                raise SourceError(
                    f"the plan's config ties {HEAD} to {EMBEDDING}, and the source yields two "
                    "different tensors; set tie_word_embeddings=false in the config"
                )
        if name != HEAD:
            yield name, tensor
