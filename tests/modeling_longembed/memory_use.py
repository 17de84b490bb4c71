"""What a computation allocates, and what it keeps for the backward pass, counted in elements."""

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def elements(tensor):
    """Elements of the storage that a tensor is a view of."""
    return tensor.untyped_storage().nbytes() // tensor.element_size()


class Allocated(TorchDispatchMode):
    """Inside `with`: elements of all tensors that operations return, and of the largest one."""

    total = largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [elements(x) for x in tree_leaves(result) if torch.is_tensor(x)]
        self.total, self.largest = self.total + sum(sizes), max([self.largest, *sizes])
        return result


class KeptForBackward(saved_tensors_hooks):
    """Inside `with`: elements of all storages that autograd keeps, views of one tensor once, and of the largest one."""

    def __init__(self):
        self.storages = {}
        super().__init__(self.keep, lambda tensor: tensor)

    def __enter__(self):
        super().__enter__()
        return self

    def keep(self, tensor):
        self.storages[tensor.untyped_storage().data_ptr()] = elements(tensor)
        return tensor

    @property
    def total(self):
        return sum(self.storages.values())

    @property
    def largest(self):
        return max(self.storages.values(), default=0)


def peak_bytes(computation):
    """Return the largest number of bytes that the CPU tensors of `computation()` take at a time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        computation()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    taken = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()  # negative where memory is given back
        peak = max(peak, taken)
    return peak
