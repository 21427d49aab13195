from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """While entered: bytes of the largest tensor that any operation makes, also by its dtype.

    Views and results written in place make nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self.by_dtype: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {x.data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x._base is None and x.data_ptr() not in known:
                size = x.untyped_storage().nbytes()
                self.nbytes = max(self.nbytes, size)
                self.by_dtype[x.dtype] = max(self.by_dtype.get(x.dtype, 0), size)
        return result
