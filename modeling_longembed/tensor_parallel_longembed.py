"""Tensor parallelism (Shoeybi et al. 2019, section 3): every process computes some of the heads and of the inner units.

transformers splits the weights by the plan below when it loads (`from_pretrained(..., distributed_config=...)`). The
number of heads that a process has then follows from its projections. What is numbered by head (slopes, tables, shifts)
asks `heads_here` for its own. Small parameters by head are whole on every process and go through `read_by_heads`.
"""

import torch
from torch import Tensor, nn


def tensor_parallel_plan(config) -> dict[str, str]:
    """Return how each weight is split: names in a `LongEmbedModel` of this config to transformers' styles.

    Projections that make heads or inner units are split by columns; those that end a residual branch are split by rows,
    with one sum over the processes each. Norms, tables and pooling are the same on every process.
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
    """Check that the heads of the model can be divided evenly among the processes that it is loaded for.

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
    """Return which heads of the model a projection computes: under tensor parallelism each process has its own.

    Args:
        projection: the linear layer that makes the heads.
        count: number of heads that it makes on this process.
        num_heads: number of heads of the model.

    Returns:
        The numbers of the heads.

    Raises:
        ValueError: a transformers that splits weights into plain tensors, which do not say whose part they are.
    """
    if count == num_heads:
        return slice(0, num_heads)
    mesh = getattr(projection.weight, "device_mesh", None)  # of a DTensor
    if mesh is None:
        raise ValueError(
            f"{count} of num_attention_heads={num_heads} heads are here, and which ones is unknown; tensor parallelism "
            "needs transformers 5.21 or later"
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
    """Return a tensor that all processes hold whole and of which each reads the rows of its own heads.

    Without this a parameter behind it would get the gradient of these heads alone.
    """
    mesh = getattr(projection.weight, "device_mesh", None)
    return tensor if mesh is None else _SumGradients.apply(tensor, mesh.get_group())
