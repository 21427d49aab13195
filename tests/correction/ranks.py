import datetime
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")


def on_ranks(size: int, function: Callable[[int, dist.ProcessGroup], Result]) -> list[Result]:
    """What `function(rank, group)` returns on each rank of a real Gloo group, made of threads."""
    store = dist.HashStore()

    def rank(number: int) -> Result:
        group = dist.ProcessGroup(store, number, size)
        timeout = datetime.timedelta(seconds=60)
        backend = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), number, size, timeout)
        group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
        group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        return function(number, group)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank, range(size)))
