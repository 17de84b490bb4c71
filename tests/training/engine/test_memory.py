"""The closed form against what autograd keeps, byte by byte, and against what a process takes."""

import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model

from modeling_longembed import LongEmbedConfig, LongEmbedForMaskedLM, LongEmbedModel
from training.engine.memory import estimate_memory

FACTOR = 1.5
TOKENS = 512


def config(**changes):
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    return LongEmbedConfig(
        **sizes | {"num_hidden_layers": 4, "max_position_embeddings": TOKENS, "hidden_dropout_prob": 0.0} | changes
    )


def kept_for_backward(model, compute) -> int:
    """Bytes of the storages that autograd keeps, parameters left out: torch itself tells."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # held, so that no other tensor gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = compute()
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def without_backward(estimate, model, bf16=False):
    """What is kept before the backward pass begins: the estimate counts what that adds to inner units, too."""
    return estimate.activations - TOKENS * 2 * model.config.intermediate_size * (2 if bf16 else 4)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden_dropout_prob": 0.1},
        {"feed_forward_gated": True},
        {"norm_placement": "pre", "final_norm": True},
        {"sublayer_pattern": "sfffffsf", "num_hidden_layers": None},
        {"position_embedding_type": "rope"},
        {"position_embedding_type": "alibi"},
        {"attention_patterns": {"type": "block", "size": 64}},
        {"attention_patterns": {"type": "sliding", "window": 64}},
    ],
)
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_what_autograd_keeps(changes, lora, bf16):
    torch.manual_seed(0)
    model = LongEmbedModel._from_config(config(**changes)).train()
    input_ids = torch.randint(1, 300, (1, TOKENS))
    foreseen = without_backward(estimate_memory(model, TOKENS, bf16=bf16, lora=lora), model, bf16)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
        adapted = without_backward(estimate_memory(model, TOKENS, bf16=bf16), model, bf16)
        assert adapted == foreseen  # told before the adapter is there, or after

    def compute():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return model(input_ids=input_ids).pooler_output

    kept = kept_for_backward(model, compute)
    if bf16:  # the copies of the matrices belong to the weights
        kept -= sum(parameter.nbytes // 2 for name, parameter in model.named_parameters() if "_proj.weight" in name)
    assert foreseen / FACTOR < kept < foreseen * FACTOR


def test_logits():
    model = LongEmbedForMaskedLM(config(vocab_size=3000, num_hidden_layers=1)).train()
    input_ids = torch.randint(1, 300, (1, TOKENS))
    labels = torch.where(torch.arange(TOKENS) < 300, input_ids, -100)

    def compute():
        return model(input_ids=input_ids, labels=labels).loss

    model.train()
    with_logits = kept_for_backward(model, compute)
    encoder = kept_for_backward(model.model, lambda: model.model(input_ids=input_ids).pooler_output)
    logits = estimate_memory(model, TOKENS, predicted=300).logits
    assert logits == 300 * 3000 * 12
    # Kept is the log-softmax; the scores live on in the output, and their gradient is made in the backward pass.
    assert with_logits - encoder == pytest.approx(logits / 3, rel=0.2)
    assert estimate_memory(model, TOKENS).logits == 0


def test_weights_gradients_and_moments_are_those_of_adamw():
    model = LongEmbedModel(config())
    model.embeddings.requires_grad_(False)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    model(torch.randint(1, 300, (1, 8))).pooler_output.sum().backward()
    optimizer.step()
    estimate = estimate_memory(model, TOKENS)
    assert estimate.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert estimate.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    assert estimate.moments == sum(moment.nbytes for moment in moments)
    assert estimate.total == estimate.weights + estimate.gradients + estimate.moments + estimate.activations


PROCESS = """
import torch
from common.step_measurement import peak_memory, reset_peak
from eval.speed.measurement import Workload, training_step
from modeling_longembed import LongEmbedConfig, LongEmbedModel
from training.engine.memory import estimate_memory
torch.set_num_threads(1)
config = LongEmbedConfig(vocab_size=300, hidden_size=128, intermediate_size=512, num_attention_heads=4,
                         num_hidden_layers=4, max_position_embeddings=8192, hidden_dropout_prob=0.1,
                         position_embedding_type="rope", attention_patterns={"type": "block", "size": 64})
model = LongEmbedModel._from_config(config)
input_ids = torch.randint(1, 300, (1, 8192))
for checkpointing in (True, False):  # the smaller one first: the peak is read again
    model.gradient_checkpointing_disable()
    step = training_step(model, Workload(gradient_checkpointing=checkpointing))
    step(input_ids[:, :64])
    base = reset_peak(False)
    step(input_ids)
    print(peak_memory(False) - base, estimate_memory(model, 8192, gradient_checkpointing=checkpointing).activations)
"""


def test_the_peak_of_a_process_that_trains():
    if not sys.platform.startswith("linux"):
        pytest.skip("the peak of a process cannot be reset here")
    # glibc keeps freed blocks below its threshold, which grows up to 32 MiB, in a heap full of holes: up to four times
    # what is alive, with tensors as small as these.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", PROCESS]
    process = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    for line in process.stdout.splitlines():
        measured, foreseen = map(int, line.split())
        assert foreseen / FACTOR < measured < foreseen * FACTOR
    assert len(process.stdout.splitlines()) == 2
