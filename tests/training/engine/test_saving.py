"""A saved adapter comes back as it was, or not at all."""

import pytest
import torch
from peft import PeftModel

from common.errors import UserError
from modeling_longembed import LongEmbedModel
from tests.training.tiny_training import tiny_config
from training.data.packing import pack
from training.engine.saving import WHOLE_WEIGHTS, HubArguments, load_adapter, save_adapter
from training.models.tuning import TuningArguments, select_parameters
from training.objectives.embed import embed

TEXTS = pack([[2, 7, 8, 9, 3], [2, *range(5, 31), *range(5, 31), 3], [2, 11, 3]], 1000)[0]


def fresh(**changes) -> LongEmbedModel:
    torch.manual_seed(5)
    return LongEmbedModel(tiny_config(**changes)).eval()


@pytest.mark.promise("M5")
def test_longlora_comes_back_bitwise_from_the_adapter_and_its_extra_file(tmp_path):
    adapted = select_parameters(fresh(), TuningArguments(tuning="longlora"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:  # as if it had been trained
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(adapted, "longlora", tmp_path)
    loaded = load_adapter(fresh(), tmp_path)
    assert embed(loaded, TEXTS).equal(embed(adapted, TEXTS))
    # The adapter alone is another model, as peft loads it: the extra file is needed, and asked for.
    assert not embed(PeftModel.from_pretrained(fresh(), str(tmp_path)), TEXTS).equal(embed(adapted, TEXTS))
    (tmp_path / WHOLE_WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"{WHOLE_WEIGHTS} is missing"):
        load_adapter(fresh(), tmp_path)


def test_publishing_needs_a_name():
    with pytest.raises(UserError, match=r"--push_to_hub needs --hub_model_id org/name"):
        HubArguments(push_to_hub=True)
