"""What the tests of the q, k, v sources share: small GPTModels on a CPU, and packed attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fp8rl.config.file import parse_config
from fp8rl.config.run import RunConfig
from fp8rl.trainer.megatron_model import _draw_weights, _transformer_config

VOCAB = 64


def config(layers: int = 4, **trainer: int) -> RunConfig:
    """4 query and 2 key/value heads, and weights large enough that layers differ."""
    model = {
        "num_layers": layers, "hidden_size": 128, "ffn_hidden_size": 128, "num_heads": 4,
        "num_kv_heads": 2, "init_std": 0.1,
    }  # fmt: skip
    whole = parse_config({"model": model})
    layout = whole.trainer.model_copy(update=trainer)  # unchecked: 4 ranks for 2 kv heads as well
    return whole.model_copy(update={"trainer": layout})


def gpt_model(
    config: RunConfig,
    core_attention: Callable[..., nn.Module] | None = None,
    vp_stage: int | None = None,
    **settings: Any,
) -> Any:
    """This rank's GPTModel or chunk of it; the same weights in every layout."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.parallel_state import is_pipeline_first_stage, is_pipeline_last_stage

    spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    if core_attention is not None:
        spec.submodules.self_attention.submodules.core_attention = core_attention
    stage = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    model = GPTModel(
        config=replace(_transformer_config(config), **settings),
        transformer_layer_spec=spec,
        vocab_size=VOCAB,
        max_sequence_length=2**20,
        pre_process=is_pipeline_first_stage(**stage),
        post_process=is_pipeline_last_stage(**stage),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=config.model.rope_theta,
        vp_stage=vp_stage,
    ).bfloat16()
    _draw_weights(model, config)
    return model


class PackedAttention(nn.Module):
    """Causal core attention in plain torch, also of packed sequences, also over context ranks.

    Stands where Transformer Engine's stands on a GPU, with its layout of tokens over ranks.
    """

    def __init__(self, *, pg_collection: Any, **_: Any) -> None:
        super().__init__()
        self.group = pg_collection.cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
    ) -> Tensor:
        packed = options["packed_seq_params"]
        if packed is None:  # [time, batch, heads, d]
            rows = [self._attend(*(x[:, row] for x in (query, key, value))) for row in
                    range(query.shape[1])]  # fmt: skip
            return torch.stack(rows, dim=1)
        ends = packed.cu_seqlens_q_padded
        ends = packed.cu_seqlens_q if ends is None else ends
        lengths = (ends.diff() // self.group.size()).tolist()
        pieces = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat([self._attend(*piece) for piece in pieces])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention [time, heads * d] of this rank's part of one sequence."""
        ranks, rank, chunk = self.group.size(), self.group.rank(), len(q) // 2
        where = torch.arange(len(q))
        if ranks > 1:  # chunk `rank` and chunk `2 ranks - 1 - rank`
            where = torch.cat([where[:chunk] + c * chunk for c in (rank, 2 * ranks - 1 - rank)])
        k, v, keys = (self._gather(x) for x in (k, v, where))
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=where[:, None] >= keys, enable_gqa=True
        )
        return out.transpose(0, 1).flatten(1)

    def _gather(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.group.size())]
        torch.distributed.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts)


def packed_params(lengths: list[int], padded: list[int] | None = None) -> Any:
    """Megatron's description of packed sequences, each with room for ``padded`` tokens."""
    from megatron.core.packed_seq_params import PackedSeqParams

    def ends(sizes: list[int]) -> Tensor:
        return torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0).to(torch.int32)

    room = lengths if padded is None else padded
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends(lengths),
        cu_seqlens_kv=ends(lengths),
        cu_seqlens_q_padded=None if padded is None else ends(padded),
        cu_seqlens_kv_padded=None if padded is None else ends(padded),
        max_seqlen_q=max(room),
        max_seqlen_kv=max(room),
    )


def causal(width: int) -> Tensor:
    """Megatron's mask: True where not attended."""
    return torch.ones(1, 1, width, width, dtype=torch.bool).triu(1)


def sequences() -> tuple[Tensor, Tensor]:
    """Eight rows of 12 tokens, and which of them are real; garbage elsewhere."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (8, 12), generator=generator)
    lengths = torch.tensor([12, 5, 8, 1, 7, 12, 3, 9])
    return tokens, torch.arange(12) < lengths[:, None]
