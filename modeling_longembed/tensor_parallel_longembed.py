"""Tensor parallelism (Shoeybi et al. 2019, section 3): every process computes a part of the heads and inner units.

transformers splits the weights by the plan below when it loads (`from_pretrained(..., distributed_config=...)`). The
number of heads on a process then follows from its projections. Code that depends on the number of a head (slopes,
tables, shifts) calls `heads_here`. Small parameters with one row per head are replicated and go through
`read_by_heads`.
"""

import torch
from torch import Tensor, nn


def tensor_parallel_plan(config) -> dict[str, str]:
    """Return how each weight is split: parameter names of a `LongEmbedModel` to transformers' styles.

    Projections that produce heads or inner units are split by columns. Those that end a residual branch are split by
    rows, with one sum over the processes each. Norms, tables and pooling are the same on every process.
    """
    patterns = {*config.get_patterns(), *config.get_training_patterns()}
    attention = {"q_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
    if not all(pattern.shares_query_key for pattern in patterns):
        attention["k_proj"] = "colwise"
    for pattern in patterns:
        attention |= {f"own.{name}": style for name, style in pattern.tensor_parallel_plan().items()}
    attention |= config.position_scheme.tensor_parallel_plan()
    feed_forward = {"up_proj": "colwise", "down_proj": "rowwise"} if "f" in config.sublayer_pattern else {}
    if feed_forward and config.feed_forward_gated:
        feed_forward["gate_proj"] = "colwise"
    plan = {f"layers.*.attention.{name}": style for name, style in attention.items()}
    plan |= {f"layers.*.feed_forward.{name}": style for name, style in feed_forward.items()}
    if config.relative_attention_num_buckets:
        plan["relative_attention_bias"] = "embedding_colwise"
    return plan


def check_parallelism(config):
    """Check that the heads of the model can be divided evenly among the processes.

    Raises:
        ValueError: they cannot.
    """
    distributed = getattr(config, "distributed_config", None)
    processes = 1 if distributed is None else distributed.tp_size
    if config.num_attention_heads % processes:
        raise ValueError(
            f"num_attention_heads={config.num_attention_heads} cannot be shared evenly by tp_size={processes} "
            "processes; choose a tp_size that divides it"
        )


def heads_here(projection: nn.Module, count: int, num_heads: int) -> slice:
    """Return which heads of the model a projection computes on this process.

    Args:
        projection: the linear layer that produces the heads.
        count: number of heads that it produces on this process.
        num_heads: number of heads of the model.

    Returns:
        The numbers of the heads.

    Raises:
        ValueError: this release of transformers splits weights into plain tensors, which have no rank.
    """
    if count == num_heads:
        return slice(0, num_heads)
    mesh = getattr(projection.weight, "device_mesh", None)  # of a DTensor
    if mesh is None:
        raise ValueError(
            f"this process has {count} of num_attention_heads={num_heads} heads, but which ones is unknown; tensor "
            "parallelism needs transformers 5.21 or later"
        )
    first = mesh.get_local_rank() * count
    return slice(first, first + count)


class _SumGradients(torch.autograd.Function):
    """Identity in the forward pass, sum over the processes in the backward pass (Megatron's operator f)."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


def read_by_heads(tensor: Tensor, projection: nn.Module) -> Tensor:
    """Return a replicated tensor of which each process uses only the rows of its own heads.

    The backward pass sums the gradients over the processes; without it each would have those of its own heads only.
    """
    mesh = getattr(projection.weight, "device_mesh", None)
    return tensor if mesh is None else _SumGradients.apply(tensor, mesh.get_group())
