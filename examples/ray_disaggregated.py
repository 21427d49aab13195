"""RL with trainers and engines apart, on Ray: asynchronous, in FP8, and a replica dies on the way.

    trainers   actors: a Hugging Face Qwen3 under FSDP2, fp32 masters. Each rank quantizes what it
       |       holds of a weight; the first rank publishes what differs from the version before
       v
    replicas   actors that Ray restarts: each owns a vLLM engine with FP8 weights and FP8 KV cache.
       |       One broadcast brings a version to all of them, and each proves that it holds it
       v
    driver     this process: hands out prompts, collects samples, says what comes next

Engines do not wait for trainers: they sample while these learn from the batch before and publish.
Requests in flight go on under the new weights. Each token carries the version that sampled it, and
counts in the loss by what the learning policy thinks of it against that one (TIS).

At --kill-step a replica is killed: what it was sampling is lost, and the step goes on with the
others. Ray restarts it; the next publish finds it there, without weights, and sends them whole.

    python examples/ray_disaggregated.py                   two trainers, two replicas, this CPU
    python examples/ray_disaggregated.py --address auto --cuda --trainers 4 --replicas 4

The reward is the share of even tokens, and the learning rate a thousand times that of RL on a real
model, so differences are large here. To scale up: a cluster (--address), NCCL and a GPU an actor
(--cuda), your model in `tiny_qwen3` and `Trainer.join`. Left out: trainers that are restarted (load
your checkpoint in `join`), engines of several GPUs (`Broadcast(workers=...)` has their sizes).
"""

from __future__ import annotations

import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

os.environ |= {  # which Ray reads as it is imported
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # a Ray of our own listens on loopback alone
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died|Task Replica.call failed",  # we say that
}

import ray
import torch
import torch.distributed as dist
import typer
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from rich.console import Console
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence

from fp8rl.correction import TIS, PPOClip, correct, count, group_advantages, policy_loss
from fp8rl.engine.rollout import RolloutEngine, Sample, Sampling
from fp8rl.engine.settings import EngineSettings
from fp8rl.errors import EngineDiedError, StaleWeightsError
from fp8rl.quant import KVCalibrator, KVScaleRule
from fp8rl.sync import Broadcast, EngineCallError, HuggingFaceQKV, Publisher, SyncReport
from fp8rl.sync.fsdp import FSDPSource

Group = tuple[list[int], list[Sample]]  # a prompt and its samples
PROMPTS = [[2 + i, 3 + i, 4 + i] for i in range(16)]
SAMPLING = Sampling(max_tokens=64, stop_token=1, samples=8)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def tiny_qwen3() -> Any:
    """A config; widths are multiples of 128, as FP8 blocks ask."""
    from transformers import Qwen3Config

    shape = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    return Qwen3Config(architectures=["Qwen3ForCausalLM"], **shape, **heads)


def engine_settings() -> EngineSettings:
    return EngineSettings(
        hf_config=tiny_qwen3().to_dict(),
        precision="fp8-kv",
        max_model_len=128,
        max_num_seqs=2,  # so few that sampling takes longer than learning, as with real models
        kv_cache_bytes=2**26,
    )


def reward(sample: Sample) -> float:
    return sum(token % 2 == 0 for token in sample.tokens) / len(sample.tokens)


@ray.remote(max_restarts=-1)
class Replica:
    """An engine. Ray answers for the actor, the actor for the engine."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.engine = RolloutEngine(engine_settings(), folder)
        self.engine.wait_ready()  # until then Ray says that the replica is away
        self.submitted: tuple[list[list[int]], int] | None = None

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the engine."""
        try:
            return getattr(self.engine, method)(*args, **kwargs)
        except EngineDiedError:
            os._exit(1)  # for Ray, which restarts both

    def submit(self, prompts: list[list[int]], version: int, seed: int) -> None:
        """Begin to sample."""
        ticket = self.call("submit", prompts, version=version, sampling=SAMPLING, seed=seed)
        self.submitted = prompts, ticket

    def collect(self) -> list[Group]:
        """What was submitted since the start, with its samples."""
        if self.submitted is None:
            return []
        (prompts, ticket), self.submitted = self.submitted, None
        return list(zip(prompts, self.call("collect", ticket), strict=True))

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)  # the kernel kills the engine with it


class ReplicaClient:
    """What a publisher needs of an engine, through Ray: four calls, and errors that come soon."""

    def __init__(self, replica: Any) -> None:
        self.replica = replica

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish_weight_update", weight_version)

    def _call(self, method: str, *args: Any) -> None:
        try:
            ray.get(self.replica.call.remote(method, *args))
        except RayTaskError as error:
            raise EngineCallError(f"{type(error.cause).__name__}: {error.cause}") from error
        except RayActorError as error:  # Ray takes some two seconds to say so
            raise EngineCallError("it died, and Ray restarts it") from error


@ray.remote
class Trainer:
    """A rank: a part of the model, and of every batch."""

    def __init__(self, rank: int, ranks: int, cuda: bool) -> None:
        self.rank, self.ranks, self.cuda = rank, ranks, cuda
        self.device = torch.device("cuda" if cuda else "cpu")
        self.store: Any = None

    def open_store(self) -> tuple[str, int]:
        """On the first rank: where the ranks find each other, on this node's address alone."""
        listener = socket.create_server((ray.util.get_node_ip_address(), 0))
        host, port = listener.getsockname()
        listening = {"is_master": True, "master_listen_fd": listener.detach()}
        self.store = dist.TCPStore(host, port, wait_for_workers=False, **listening)
        return host, port

    def join(self, host: str, port: int, replicas: Sequence[Any]) -> None:
        """Meet the other ranks and shard the model; the first rank also meets the engines."""
        from transformers import Qwen3ForCausalLM

        store = self.store or dist.TCPStore(host, port)
        dist.init_process_group(store=store, rank=self.rank, world_size=self.ranks)
        torch.manual_seed(0)  # the same weights everywhere, of which each rank keeps its part
        self.model = Qwen3ForCausalLM(tiny_qwen3()).to(self.device)
        mesh = dist.init_device_mesh(self.device.type, (self.ranks,))
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for part in [*self.model.model.layers, self.model]:
            fully_shard(part, mesh=mesh, mp_policy=precision)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

        self.qkv = HuggingFaceQKV(self.model)
        self.calibrator = KVCalibrator(KVScaleRule(), self.qkv.shape)
        self.seen = torch.tensor(PROMPTS, device=self.device), None
        self.source = FSDPSource(self.model)
        self.publisher = Publisher(
            engine_settings().plan(),
            [ReplicaClient(replica) for replica in replicas] if self.rank == 0 else None,
            transport=Broadcast([1] * len(replicas), "nccl" if self.cuda else "gloo", host),
            kv_layers=self.qkv.shape.layers,
            fp32_as="export",  # the forward computes with masters rounded to BF16 too
            deltas=True,
        )

    def publish(self, version: int) -> SyncReport | None:
        """Bring this version to the replicas; returns when they have proven that they hold it."""
        tokens, real = self.seen
        observer = self.calibrator.observer()
        with self.qkv.watch(observer) as watch, torch.no_grad():
            watch.token_mask = real
            self.model(tokens, use_cache=False)
        scales = self.calibrator.scales(observer.observation().reduced(), version)
        return self.publisher.publish(self.source, version=version, kv_scales=scales)

    def learn(self, groups: Sequence[Group]) -> None:
        """Take one optimizer step on a batch, of which each rank computes a part."""
        tokens, mask, behaviour, rewards = self.to_tensors(groups[self.rank :: self.ranks])
        logits = self.model(tokens[:, :-1], use_cache=False).logits.float()
        chosen = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        new = torch.where(mask, torch.nn.functional.pad(chosen, (1, 0)), 0.0)
        old = new.detach()  # one step on each batch: REINFORCE
        fix = correct([TIS(cap=2.0)], old, behaviour, mask)
        counts = count(fix.kept, group=dist.group.WORLD)  # of the whole batch
        advantages = group_advantages(rewards, SAMPLING.samples)
        config = PPOClip()
        made = policy_loss(config, new, old, advantages, fix.weights, fix.kept, counts=counts)
        (self.ranks * made.loss).backward()  # FSDP takes the mean over ranks
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seen = tokens, mask | (torch.arange(tokens.shape[1]) < len(PROMPTS[0])).to(self.device)

    def to_tensors(self, groups: Sequence[Group]) -> tuple[torch.Tensor, ...]:
        """Tokens, response mask and behaviour log-probs [B, S], rewards [B]."""
        rows = [(prompt, sample) for prompt, samples in groups for sample in samples]
        tokens = [[*prompt, *sample.tokens] for prompt, sample in rows]
        mask = [[False] * len(prompt) + [True] * len(sample.tokens) for prompt, sample in rows]
        behaviour = [[0.0] * len(prompt) + [*sample.logprobs] for prompt, sample in rows]
        padded = (
            pad_sequence([torch.tensor(row) for row in each], batch_first=True)
            for each in (tokens, mask, behaviour)
        )
        rewards = torch.tensor([reward(sample) for _, sample in rows])
        return tuple(each.to(self.device) for each in (*padded, rewards))


@contextmanager
def placed(address: str, actors: int, cuda: bool) -> Iterator[list[dict[str, Any]]]:
    """Room for so many actors, in a cluster or in a Ray of our own; given back at the end."""
    if address == "local":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        local = {"num_cpus": actors, "include_dashboard": False, "object_store_memory": 2**27}
        ray.init("local", log_to_driver=False, logging_level="ERROR", **local)
    else:
        ray.init(address, log_to_driver=False)
    try:
        group = placement_group([{"CPU": 1, "GPU": 1} if cuda else {"CPU": 1}] * actors)
        ray.get(group.ready())
        places = [PlacementGroupSchedulingStrategy(group, bundle) for bundle in range(actors)]
        yield [{"scheduling_strategy": p, "num_cpus": 1, "num_gpus": int(cuda)} for p in places]
    finally:
        ray.shutdown()


def submit(replicas: list[Any], serving: list[int], version: int) -> None:
    """Have all prompts sampled by the replicas that serve."""
    for turn, number in enumerate(serving):
        seed = (version * len(serving) + turn) * len(PROMPTS) * SAMPLING.samples
        replicas[number].submit.remote(PROMPTS[turn :: len(serving)], version, seed)


def collect(replicas: list[Any], serving: list[int]) -> list[Group]:
    """What they sampled; nothing from one that died. Raises where all have."""
    groups: list[Group] = []
    for samples in [replicas[number].collect.remote() for number in serving]:
        with suppress(RayActorError, StaleWeightsError):
            groups += ray.get(samples)
    if not groups:
        raise EngineCallError(f"replicas {serving} died, and no other serves")
    return groups


def samples_of(groups: list[Group]) -> list[Sample]:
    return [sample for _, samples in groups for sample in samples]


def mean_reward(groups: list[Group]) -> float:
    return fmean(map(reward, samples_of(groups)))


def row(step: int, groups: list[Group], report: SyncReport, serving: list[int]) -> str:
    tokens = Counter(v for sample in samples_of(groups) for v in sample.versions)
    shares = " ".join(f"v{v}:{tokens[v] / tokens.total():.0%}" for v in sorted(tokens))
    wire = f"{report.nbytes:,} ({report.nbytes / report.bf16_nbytes:.1%})"
    learnt = f"{step:>4}  {mean_reward(groups):.3f}   {report.kind:<5}"
    return f"{learnt}  {wire:>20}  {shares:<14}  {' '.join(map(str, serving))}"


def summary(history: list[tuple[list[Group], SyncReport]]) -> str:
    samples = [sample for groups, _ in history for sample in samples_of(groups)]
    mixed = sum(len(set(sample.versions)) > 1 for sample in samples)
    deltas = sum(report.kind == "delta" for _, report in history)
    return (
        f"reward {mean_reward(history[0][0]):.3f} -> {mean_reward(history[-1][0]):.3f}; {deltas} "
        f"of {len(history)} versions were sent as differences; {mixed} of {len(samples)} responses "
        "lived through an update"
    )


@app.command(help="\b\n" + __doc__.replace("\n\n", "\n\n\b\n"))
def main(
    steps: Annotated[int, typer.Option(min=1, help="RL steps.")] = 10,
    kill_step: Annotated[int, typer.Option(min=0, help="Kill a replica then; 0: never.")] = 3,
    trainers: Annotated[int, typer.Option(min=1, max=4, help="Trainer ranks.")] = 2,
    replicas: Annotated[int, typer.Option(min=2, max=4, help="Rollout engines.")] = 2,
    cuda: Annotated[bool, typer.Option("--cuda", help="A GPU for each actor, NCCL.")] = False,
    address: Annotated[str, typer.Option(help="Of a Ray cluster; local: our own.")] = "local",
    out: Annotated[Path, typer.Option(help="Folder of the engines' logs.")] = Path("runs/ray"),
) -> None:
    console = Console(highlight=False, soft_wrap=True)
    with placed(address, trainers + replicas, cuda) as places:
        with console.status(f"starting {trainers} trainer ranks and {replicas} engines"):
            make = [Trainer.options(**place) for place in places[:trainers]]
            ranks = [one.remote(rank, trainers, cuda) for rank, one in enumerate(make)]
            make = [Replica.options(**place) for place in places[trainers:]]
            engines = [one.remote(out.absolute() / f"replica-{i}") for i, one in enumerate(make)]
            host, port = ray.get(ranks[0].open_store.remote())
            ray.get([rank.join.remote(host, port, engines) for rank in ranks])
            report = ray.get([rank.publish.remote(0) for rank in ranks])[0]
            serving = list(range(replicas))
            submit(engines, serving, 0)
            groups = collect(engines, serving)
            history = [(groups, report)]
        console.print("step  reward  sync       bytes (of BF16)  sampled by      replicas")
        for step in range(1, steps + 1):
            submit(engines, serving, step - 1)
            if step == kill_step:
                console.print(f"      replica {replicas - 1} is killed")
                with suppress(RayActorError):
                    ray.get(engines[-1].die.remote())
            ray.get([rank.learn.remote(groups) for rank in ranks])
            if kill_step and step == min(kill_step + 2, steps):  # a demo waits to show the return
                ray.get(engines[-1].call.options(max_task_retries=-1).remote("wait_ready"))
            report = ray.get([rank.publish.remote(step) for rank in ranks])[0]
            groups = collect(engines, serving)
            for number in range(replicas):
                if number in report.failed:
                    console.print(f"      replica {number} is left out: {report.failed[number]}")
                elif number not in serving:
                    console.print(f"      replica {number} is back, and gets everything")
            serving = [number for number in range(replicas) if number not in report.failed]
            console.print(row(step, groups, report, serving))
            history.append((groups, report))
    console.print(summary(history))


if __name__ == "__main__":
    app()
