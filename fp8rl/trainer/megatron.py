"""The reference trainer: megatron-core on the CPU, over tensor- and pipeline-parallel ranks.

Scoring and training use one forward pass, so that both see the same numbers:

    lp[b, t] = log softmax(logits[b, t-1] / temperature)[tokens[b, t]]      in fp32, by chunks

Forward, backward and the exchange between ranks are Megatron's own (schedules, DDP gradient
buffers in fp32); the optimizer is ``master_adamw.py``. A batch is cut into micro-batches of one
size; the last is filled up with empty rows, which no loss sees.
Every rank is given the whole batch and returns the same results. With precision fp8-aligned the
linears compute with the engine's FP8 weights, and with FP8 inputs where it does
(``quant/fake_quant.py``). Left out: data parallelism, recomputation, GPUs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.nn.functional import pad

from fp8rl.batch import TokenBatch
from fp8rl.config.run import RunConfig
from fp8rl.correction import TokenScores, log_probs_from_logits
from fp8rl.errors import TrainerError
from fp8rl.quant import (
    AttentionShape,
    FakeQuantization,
    KVObservation,
    KVObserver,
    QuantPlan,
    ScaleFormat,
    fake_quantize,
)
from fp8rl.sync.megatron import MegatronSource
from fp8rl.sync.megatron_layout import global_parameters
from fp8rl.sync.qkv_megatron import MegatronQKV
from fp8rl.sync.routing_megatron import MegatronRouters
from fp8rl.trainer.master_adamw import MasterAdamW
from fp8rl.trainer.megatron_cpu import cpu_stands_in
from fp8rl.trainer.megatron_model import build_model, hf_config
from fp8rl.trainer.micro_batch import MicroBatch, cut

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

LossFn = Callable[[Tensor, slice], Tensor]
"""(log-probs fp32 [b, S], which rows of the batch) -> these rows' share of the batch's loss."""


class MegatronTrainer:
    """The policy, its optimizer, and what the loop asks of them; made on every rank.

    Call inside ``init_distributed(config)``. ``vocab_size`` must divide by
    ``trainer.tensor_parallel``. The model's layout over ranks does not change its initial weights.

    With ``trainer.precision`` fp8-aligned, every forward, from the first step of the warm-up on,
    computes with the FP8 weights that ``plan``, the engine's, publishes. Names, masters, gradients
    and checkpoints are those of a BF16 trainer, which can go on with them.

    Raises:
        TrainerError: fp8-aligned without a plan.
        FakeQuantError: an FP8 block straddles tensor-parallel ranks.
    """

    def __init__(self, config: RunConfig, vocab_size: int, plan: QuantPlan | None = None) -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )

        self._config = config
        with cpu_stands_in():
            self._model = build_model(config, vocab_size)
            self._model.config.finalize_model_grads_func = finalize_model_grads
            self._ddp = DistributedDataParallel(
                self._model.config,
                DistributedDataParallelConfig(grad_reduce_in_fp32=True),
                self._model,
            )
            self._optimizer = MasterAdamW(
                global_parameters(self._model),
                learning_rate=config.trainer.learning_rate,
                weight_decay=config.trainer.weight_decay,
                grad_clip=config.trainer.grad_clip,
                group=parallel_state.get_model_parallel_group(),
            )
        described = hf_config(config.model, vocab_size, max_positions=1)  # which shape no tensor
        self._source = MegatronSource(self._model, described)
        self._qkv = MegatronQKV(self._model)
        self._fake_quant: FakeQuantization | None = None
        if config.trainer.precision == "fp8-aligned":
            if plan is None:
                raise TrainerError("trainer.precision is fp8-aligned; give the engine's QuantPlan")
            self._fake_quant = fake_quantize(
                self._source.linears(), plan, activations=engine_activations(config)
            )

    @property
    def attention_shape(self) -> AttentionShape:
        """Layers and heads of the whole model."""
        return self._qkv.shape

    @property
    def model(self) -> GPTModel:
        """This rank's part of the model, for hooks."""
        return self._model

    def log_probs(
        self, batch: TokenBatch, observer: KVObserver | None = None
    ) -> Float32[Tensor, "batch time"]:
        """Score a batch: fp32 [B, S], 0.0 where ``response_mask`` is False; same on every rank."""
        return self.score(batch, observer).logprobs

    @torch.no_grad()
    def score(
        self,
        batch: TokenBatch,
        observer: KVObserver | None = None,
        *,
        temperature: float | None = None,
    ) -> TokenScores:
        """Log-probs of a batch, and the entropy of the policy where each token was drawn, in nats.

        Each fp32 [B, S], 0.0 where ``response_mask`` is False; the same on every rank. ``observer``
        sees q, k and v of this rank's layers and heads at the real tokens of the first micro-batch,
        which is enough to count on and costs little. ``temperature``: None is the rollout's.
        """

        def finish(micro: MicroBatch, logits: Tensor, non_loss_data: bool) -> Tensor:
            found = self._scores(micro, logits, entropy=True, temperature=temperature)
            return torch.stack(found)[:, : micro.real]

        width = batch.tokens.shape[1] - 1
        parts = self._run(batch, finish, width=width, train=False, observer=observer, observed=1)
        shape = (2, *batch.tokens.shape)
        result = self._from_last_stage(torch.cat(parts, dim=1) if parts else torch.empty(shape))
        return TokenScores(*result)

    def update(
        self,
        batch: TokenBatch,
        loss_fn: LossFn,
        learning_rate: float | None = None,
        *,
        divisor: Callable[[], Tensor] | None = None,
    ) -> dict[str, float]:
        """Take one optimizer step on the whole batch; return its "loss" and "grad_norm".

        ``loss_fn`` gets log-probs fp32 [b, S] of a run of rows and that run as a slice; it returns
        their share of the batch's loss, already normalized: the shares' sum is the loss. If that
        is known only when all shares are, ``divisor`` is asked then, on the last pipeline stage,
        and loss and gradient are divided by the 0-d tensor that it returns. The norm is that
        before clipping. Loss and norm are the same on every rank.

        Raises:
            TrainerError: the gradient norm is not finite; the weights are unchanged.
        """

        def finish(micro: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor]:
            [logprobs] = self._scores(micro, logits)
            loss = loss_fn(logprobs[: micro.real], micro.rows)
            return loss * micro.count, loss.detach()  # Megatron divides by the count again

        self._ddp.zero_grad_buffer()
        losses = self._run(batch, finish, width=batch.tokens.shape[1] - 1, train=True)
        loss = torch.stack(losses).sum().float() if losses else torch.zeros(())
        divided_by = 1.0
        if divisor is not None:
            total = divisor().float() if losses else torch.zeros(())
            divided_by = float(self._from_last_stage(total))
        with cpu_stands_in():
            norm = self._optimizer.step(learning_rate, divided_by)
        return {"loss": float(self._from_last_stage(loss)) / divided_by, "grad_norm": norm}

    def from_last_stage(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """What the last pipeline stage gives here, on every rank; other stages' is not looked at.

        Not a pickle: JSON, whose floats come back bit for bit.
        """
        text = torch.tensor(list(json.dumps(dict(numbers)).encode()), dtype=torch.uint8)
        length = self._from_last_stage(torch.tensor(len(text)))
        text = text if len(text) == length else torch.empty(int(length), dtype=torch.uint8)
        found: dict[str, float] = json.loads(bytes(self._from_last_stage(text).tolist()))
        return found

    @torch.no_grad()
    def observe_kv(self, batch: TokenBatch, observer: KVObserver) -> KVObservation:
        """Observe q, k and v of a batch as attention meets them (post QK-norm and RoPE).

        Padding is never observed. What is returned is complete, and the same on every rank.

        Raises:
            ShardError: the ranks' observers are not of one kind. RuntimeError: a rank has gone.
        """
        width = batch.tokens.shape[1]
        self._run(batch, _finish_nothing, width=width, train=False, observer=observer)
        return observer.observation().reduced()

    @torch.no_grad()
    def observe_routes(self, batch: TokenBatch) -> Int64[Tensor, "batch time layers k"]:
        """The experts to which the tokens of a batch go, the first choice first; on every rank.

        What stands at padding means nothing. Raises RoutingError for a model without experts.
        """
        from megatron.core import parallel_state

        width = batch.tokens.shape[1]
        with MegatronRouters(self._model).watch() as routes:
            self._run(batch, _finish_nothing, width=width, train=False)
        found = routes.gathered(
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_model_parallel_group(),
        )
        return found[: len(batch.tokens), :width]

    def restart_optimizer(self) -> None:
        """Forget Adam's moments: what comes next is another objective."""
        self._optimizer.forget()

    def source(self) -> MegatronSource:
        """Return the policy's weights as a stream of Hugging Face tensors, whole on every rank."""
        return self._source

    def state(self) -> dict[str, Tensor]:
        """Copy all that this rank needs to go on exactly: flat, contiguous CPU tensors.

        ``model/*`` BF16, ``master/*`` and ``adam/*`` fp32 under global layer numbers, and
        ``rng/torch`` uint8. Megatron's RNG tracker holds no state here (``megatron_cpu.py``).
        """
        weights = global_parameters(self._model)
        return {
            **{f"model/{name}": p.detach().clone() for name, p in weights.items()},
            **self._optimizer.state(),
            "rng/torch": torch.get_rng_state(),
        }

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned on the same rank of the same layout.

        Raises:
            TrainerError: names, shapes or dtypes differ; nothing was changed.
        """
        _check_same_layout(state, self.state())
        for name, parameter in global_parameters(self._model).items():
            parameter.copy_(state[f"model/{name}"])
        self._optimizer.load_state(state)
        torch.set_rng_state(state["rng/torch"])

    def _scores(
        self,
        micro: MicroBatch,
        logits: Tensor,
        *,
        entropy: bool = False,
        temperature: float | None = None,
    ) -> list[Tensor]:
        """Log-probs (with ``entropy`` also entropies) of this rank's logits [b, S - 1, vocab / tp].

        Each fp32 [b, S], 0.0 outside the responses.
        """
        from megatron.core import parallel_state

        found = log_probs_from_logits(
            logits[:, : micro.tokens.shape[1] - 1],  # without what filled up the sequence
            micro.tokens[:, 1:].contiguous(),
            temperature=temperature or self._config.rollout.temperature,
            entropy=entropy,
            group=parallel_state.get_tensor_model_parallel_group(),
        )
        padded = [pad(x, (1, 0)) for x in found if x is not None]
        return [torch.where(micro.response_mask, x, 0.0) for x in padded]

    def _run(
        self,
        batch: TokenBatch,
        finish: Callable[..., Any],
        *,
        width: int,
        train: bool,
        observer: KVObserver | None = None,
        observed: int | None = None,
    ) -> list[Any]:
        """Run Megatron's schedule on the first ``width`` tokens of each row.

        ``finish(micro, logits)`` runs on the last stage; its results are returned there, in the
        order of the rows, and elsewhere the list is empty. ``observer`` sees q, k and v of the
        first ``observed`` micro-batches, or of all.
        """
        from megatron.core.pipeline_parallel import get_forward_backward_func

        micros = cut(batch, self._config.trainer.micro_batch_size)
        whole = self._whole_width(width)
        causal = torch.ones(1, 1, whole, whole, dtype=torch.bool).triu(1)  # True: not attended
        positions, filling = torch.arange(whole), (0, whole - width)

        def forward(
            data: Iterator[tuple[int, MicroBatch]], model: Any
        ) -> tuple[Tensor, Callable[..., Any]]:
            index, micro = next(data)
            if watch is not None:
                watch.token_mask = pad(micro.token_mask[:, :width], filling)
                watch.paused = observed is not None and index >= observed
            tokens = pad(micro.tokens[:, :width], filling)
            output = model(tokens, positions.expand_as(tokens), causal)
            return output, partial(finish, micro)

        held = self._fake_quant.held() if self._fake_quant else nullcontext()
        watched = self._qkv.watch(observer) if observer is not None else nullcontext()
        with cpu_stands_in(), held, watched as watch:  # the weights change only between runs
            results = get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=enumerate(micros),
                model=self._ddp,
                num_microbatches=len(micros),
                seq_length=whole,
                micro_batch_size=micros[0].tokens.shape[0],
                forward_only=not train,
                collect_non_loss_data=not train,
            )
        return list(results)

    def _whole_width(self, width: int) -> int:
        """A width that the ranks can divide, where each has a part of the sequence."""
        ranks = self._config.trainer.tensor_parallel
        return -(-width // ranks) * ranks if self._model.config.sequence_parallel else width

    def _from_last_stage(self, tensor: Tensor) -> Tensor:
        """Make the last pipeline stage's tensor that of all stages."""
        from megatron.core import parallel_state

        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(tensor, last, group=parallel_state.get_pipeline_model_parallel_group())
        return tensor


def _finish_nothing(micro: MicroBatch, logits: Tensor, non_loss_data: bool) -> None:
    """Want nothing of a forward but what is observed in it."""


def engine_activations(config: RunConfig) -> ScaleFormat | None:
    """How the engine's FP8 linears take their input: FP8 if so configured, and always on CUDA."""
    fp8 = config.rollout.activations == "fp8" or torch.cuda.is_available()
    return "pow2" if fp8 else None


def _check_same_layout(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if odd := sorted(found.keys() ^ expected.keys()):
        raise TrainerError(
            f"the trainer's state and the one to load differ in {len(odd)} names, among them "
            f"{odd[:4]}; load it into the model and the ranks it was saved from"
        )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            raise TrainerError(
                f"state {name!r} is {found[name].dtype} {list(found[name].shape)}, expected "
                f"{tensor.dtype} {list(tensor.shape)}; load it into the model it was saved from"
            )
