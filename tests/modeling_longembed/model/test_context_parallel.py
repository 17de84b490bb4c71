"""What context parallelism of torch and accelerate does with this attention, and what accelerate does with tensor
parallelism on CPUs: the findings of docs/reports/parallelism.md.

They are of the versions below, and other versions skip: when a pin moves, look again and rewrite the page.
"""

import os

import accelerate
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState
from packaging.version import Version
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel

from modeling_longembed import LongEmbedConfig, LongEmbedModel
from tests.fresh_processes import with_fresh_processes
from tests.two_processes import PROCESSES, in_two_processes

pytestmark = [
    with_fresh_processes,
    pytest.mark.slow,  # it tests what torch and accelerate refuse, which changes with their versions and not with ours
]

if (Version(torch.__version__).release[:2], Version(accelerate.__version__).release[:2]) != ((2, 13), (1, 15)):
    pytest.skip("the findings are of torch 2.13 and accelerate 1.15", allow_module_level=True)
ring = pytest.importorskip("torch.distributed.tensor.experimental._context_parallel._attention")


def document() -> list[torch.Tensor]:
    """Query, key and value of one document of 16 tokens, `(1, H, L, D)`."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 16, 8, generator=generator) for _ in range(3)]


def model() -> LongEmbedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    return LongEmbedModel(LongEmbedConfig(**sizes, num_hidden_layers=2, initializer_range=0.3)).eval()


def outcome(function) -> object:
    """What the function returns, or its error as text."""
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def of_one_process(rank: int) -> dict:
    """What one of two processes finds."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}  # accelerate asks for them and calls nobody
    mesh = init_device_mesh("cpu", (PROCESSES,), mesh_dim_names=("cp",))

    def attention(gradient: bool = False, **options) -> torch.Tensor:
        states = document()
        with context_parallel(mesh, buffers=states, buffer_seq_dims=[2, 2, 2]):
            query, key, value = (x.clone().requires_grad_(gradient) for x in states)
            attended = F.scaled_dot_product_attention(query, key, value, **options)
            if gradient:
                attended.sum().backward()
        return attended.detach()

    def rotated(load_balance: bool) -> list[torch.Tensor]:
        """Output and gradients of the ring itself, which on CPU is reached by no public name."""
        ring._cp_options.enable_load_balance = load_balance
        shards = [x.chunk(PROCESSES, dim=2)[rank] for x in document()]
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        output, logsumexp = ring._templated_ring_attention(mesh.get_group(), 2, kernel, *shards)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        states = (output.cos(), "grad_out", *shards, output, logsumexp, False)
        gradients = ring._templated_ring_attention_backward(mesh.get_group(), 2, kernel, *states, dropout_p=0.0)
        return [output, *gradients]

    def encoder() -> torch.Tensor:
        ids = torch.arange(1, 17)[None]
        with torch.no_grad(), context_parallel(mesh, buffers=[ids], buffer_seq_dims=[1]):
            return model()(ids).pooler_output

    def accelerator(**sizes) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)  # of the one before
        Accelerator(cpu=True, parallelism_config=ParallelismConfig(**sizes))

    return {
        "forward": outcome(lambda: attention().shape[2]),
        "backward": outcome(lambda: attention(gradient=True)),
        "mask": outcome(lambda: attention(attn_mask=torch.ones(16, 16, dtype=torch.bool))),
        "bias": outcome(
            lambda: ring._scaled_dot_product_ring_efficient_attention(mesh, *document(), attn_bias=torch.zeros(1))
        ),
        "ring, default": outcome(lambda: rotated(load_balance=True)),
        "ring": outcome(lambda: rotated(load_balance=False)),
        "model": outcome(encoder),
        "accelerate, cp": outcome(lambda: accelerator(cp_size=PROCESSES)),
        "accelerate, sp": outcome(lambda: accelerator(sp_size=PROCESSES)),
        "accelerate, tp": outcome(lambda: accelerator(tp_size=PROCESSES)),
    }


@pytest.fixture(scope="module")
def findings(tmp_path_factory) -> list[dict]:
    return in_two_processes(of_one_process, tmp_path_factory.mktemp("processes"))


REFUSALS = {
    "backward": "NotImplementedError: Operator aten._scaled_dot_product_flash_attention_for_cpu_backward.default does "
    "not have a sharding strategy",
    "mask": "RuntimeError: Sharding dim 2 greater than tensor ndim 2",
    "bias": "NotImplementedError: attn_bias is not supported yet",
    "ring, default": "RuntimeError: Load balancing requires `is_causal=True`",
    "accelerate, cp": "ValueError: ParallelismConfig is only compatible",
    "accelerate, sp": "ValueError: ParallelismConfig is only compatible",
    "accelerate, tp": "ValueError: ParallelismConfig is only compatible",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_refused(name, findings):
    for found in findings:
        assert found[name].startswith(REFUSALS[name])


def test_the_ring_itself_is_right_for_one_document_without_mask(findings):
    states = [x.requires_grad_() for x in document()]
    output = F.scaled_dot_product_attention(*states)
    expected = [output.detach(), *torch.autograd.grad(output.sin().sum(), states)]
    for rank, found in enumerate(findings):
        shares = [x.chunk(PROCESSES, dim=2)[rank] for x in expected]
        torch.testing.assert_close(found["ring"], shares, atol=1e-6, rtol=0)
        assert found["forward"] == 16 // PROCESSES


def test_our_model_is_not_parallel_in_it_and_says_nothing(findings):
    """Each process reads its share as a document of its own: other embeddings, without an error."""
    with torch.no_grad():
        expected = model()(torch.arange(1, 17)[None]).pooler_output
    for found in findings:
        assert (found["model"] - expected).abs().max() > 0.1
