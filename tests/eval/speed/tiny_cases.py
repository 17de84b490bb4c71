"""Workloads and cases that are measured in a moment."""

from dataclasses import replace

from eval.speed.measurement import Case, Workload

TINY = Workload(
    num_hidden_layers=1, hidden_size=32, num_attention_heads=4, intermediate_size=64, device="cpu", threads=1
)


def tiny_case(length, kernel="longembed_varlen", pattern=None, **fields) -> Case:
    """A case of a tiny random model; `fields` are of its workload."""
    return Case(replace(TINY, **fields), pattern, kernel, length, context=length)
