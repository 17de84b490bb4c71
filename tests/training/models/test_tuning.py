"""Which parameters train under each kind of tuning, what stays bitwise, and what comes back from the saved files."""

import pytest
import torch

from common.errors import UserError
from modeling_longembed import LongEmbedModel
from tests.training.tiny_training import tiny_config
from training.data.packing import pack
from training.engine.optimizer import parameter_groups
from training.models.tuning import TuningArguments, original_rows, select_parameters
from training.objectives.embed import embed

TEXTS = pack([[2, 7, 8, 9, 3], [2, *range(5, 31), *range(5, 31), 3], [2, 11, 3]], 1000)[0]


def fresh(**changes) -> LongEmbedModel:
    torch.manual_seed(5)
    return LongEmbedModel(tiny_config(**changes)).eval()


def train(model, steps: int = 3, weight_decay: float = 0.5) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay), lr=0.05)
    for _ in range(steps):
        embeddings = embed(model, TEXTS)
        (embeddings @ embeddings.T).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_names(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict, model) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if name in before and not before[name].equal(tensor)}


@pytest.mark.promise("M4")
def test_lora_starts_as_the_base_model_and_merges_to_itself():
    expected = embed(fresh(), TEXTS)
    adapted = select_parameters(fresh(), TuningArguments(tuning="lora"))
    torch.testing.assert_close(embed(adapted, TEXTS), expected, atol=1e-6, rtol=0)
    train(adapted)
    trained = embed(adapted, TEXTS)
    assert (trained - expected).abs().max() > 1e-2
    torch.testing.assert_close(embed(adapted.merge_and_unload(), TEXTS), trained, atol=1e-5, rtol=0)


@pytest.mark.promise("M4")
def test_lora_trains_r_times_both_widths_a_matrix_and_leaves_the_base_bitwise():
    adapted = select_parameters(fresh(), TuningArguments(tuning="lora", lora_r=3))
    count = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    assert count == 2 * 4 * 3 * (32 + 32)  # layers * projections * r * (in + out)
    before = weights(adapted)
    train(adapted)
    moved = changed(before, adapted)
    assert moved
    assert all("lora_" in name for name in moved)


@pytest.mark.promise("M4")
def test_lora_under_gradient_checkpointing_has_a_gradient_on_every_adapter():
    model = fresh()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted = select_parameters(model, TuningArguments(tuning="lora")).train()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)  # at the start B is zero, and with it the gradient of A
    embed(adapted, TEXTS)[:, 0].sum().backward()
    gradients = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(gradients) == 2 * 4 * 2
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.promise("M5")
def test_longlora_trains_the_embeddings_and_norms_too():
    lora = trained_names(select_parameters(fresh(), TuningArguments(tuning="lora")))
    longlora = trained_names(select_parameters(fresh(), TuningArguments(tuning="longlora")))
    norms = {f"layers.{number}.norm.{kind}" for number in range(4) for kind in ("weight", "bias")}
    tables = {f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")}
    expected = norms | tables | {"embeddings.norm.weight", "embeddings.norm.bias"}
    assert longlora - lora == {f"base_model.model.{name}" for name in expected}
    assert lora <= longlora


@pytest.mark.parametrize(
    ("method", "length", "old"), [("repeat", 100, 32), ("interpolate", 100, 32), ("interpolate", 96, 24)]
)
def test_positions_tuning_moves_the_new_rows_alone(method, length, old):
    extension = {"method": method, "original_max_position_embeddings": old}
    short = pack([[2, 7, 8, 9, 3], [2, *range(5, 25), 3]], 1000)[0]
    model = fresh(max_position_embeddings=length, position_extension=extension)
    assert original_rows(model).sum() == old
    embedding_of_short, before = embed(model, short), weights(model)
    select_parameters(model, TuningArguments(tuning="positions"))
    train(model)
    table = "embeddings.position_embeddings.weight"
    assert changed(before, model) == {table}
    moved = (before[table] != model.state_dict()[table]).any(dim=1)
    assert moved.any()
    assert not (moved & original_rows(model)).any()
    # A text within the original context reads the original rows: its embedding is the same to the last bit.
    assert embed(model, short).equal(embedding_of_short)


def test_original_rows_are_those_that_a_short_text_reads():
    """Against the model itself: only the rows of the table that texts of the original length touch get a gradient."""
    for method in ("repeat", "interpolate"):
        extension = {"method": method, "original_max_position_embeddings": 30}
        model = fresh(max_position_embeddings=100, position_extension=extension)
        embed(model, pack([[7] * 30], 1000)[0])[:, 0].sum().backward()
        read = model.embeddings.position_embeddings.weight.grad.abs().sum(dim=1) > 0
        assert read.equal(original_rows(model))


def test_a_table_that_was_not_extended_trains_whole():
    model = fresh()
    select_parameters(model, TuningArguments(tuning="positions"))
    assert trained_names(model) == {"embeddings.position_embeddings.weight"}
    assert not original_rows(model).any()


def test_refusals():
    with pytest.raises(UserError, match="no position table"):
        select_parameters(fresh(position_embedding_type="alibi"), TuningArguments(tuning="positions"))
    with pytest.raises(UserError, match="--lora_target_modules nothing"):
        select_parameters(fresh(), TuningArguments(tuning="lora", lora_target_modules=["nothing"]))
