"""Fixtures of the tests of the GPU's checks."""

from unittest.mock import patch

import pytest

from modeling_longembed import attention_kernels_longembed, pattern_local_longembed


@pytest.fixture
def as_on_cuda():
    """The path of the GPU, its kernel stood in for by one that looks at nothing: what surrounds it is traced."""
    with (
        patch.object(attention_kernels_longembed, "varlen_attn", lambda query, *args, **kwargs: query * 1.0),
        patch.object(attention_kernels_longembed, "varlen_kernel_applies", lambda query, dropout: True),
        patch.object(pattern_local_longembed, "varlen_kernel_applies", lambda query, dropout: True),
    ):
        yield
