"""`extend_context`: a trained model reads what it could read as before, and more; it is saved and extended again."""

import pytest
import torch

from modeling_longembed import LongEmbedForMaskedLM, LongEmbedModel
from modeling_longembed.position_schemes_longembed import POSITION_SCHEMES

CONTEXT = 16
SCHEMES = ["absolute", "sinusoidal", "rope", "alibi", "relative"]
METHODS = [(scheme, method) for scheme in SCHEMES for method in POSITION_SCHEMES[scheme].extensions or (None,)]
FIRST = dict(reversed(METHODS))  # scheme -> its first method


def batch(*lengths, seed=0):
    torch.manual_seed(seed)
    mask = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
    return {"input_ids": torch.randint(1, 64, mask.shape), "attention_mask": mask}


def build(build_tiny_model, scheme, cls=LongEmbedModel, context=CONTEXT, **fields):
    return build_tiny_model(cls, position_embedding_type=scheme, max_position_embeddings=context, **fields).double()


def parameters(method):
    return {"restart": {"period": 8}, "group": {"neighbours": 4}}.get(method, {})


def own_parameters(scheme, method):
    return {} if (scheme, method) != ("rope", "group") and method == "group" else parameters(method)


@pytest.mark.usefixtures("without_code")
@pytest.mark.parametrize(
    ("scheme", "method", "cls"),
    [
        # It is the encoder that is extended: that this is so beneath a head is seen with the first method of a scheme.
        pytest.param(
            scheme,
            method,
            cls,
            marks=[] if cls is LongEmbedModel or method == FIRST[scheme] else [pytest.mark.slow],
        )
        for scheme, method in METHODS
        for cls in (LongEmbedModel, LongEmbedForMaskedLM)
    ],
)
def test_what_fitted_reads_as_before_and_longer_documents_can_be_read(build_tiny_model, tmp_path, scheme, method, cls):
    model = build(build_tiny_model, scheme, cls)
    short, long = batch(8, 3) if method == "restart" else batch(CONTEXT, 5, 1), batch(3 * CONTEXT, 70)
    before = model(**short)[0]
    assert model.extend_context(5 * CONTEXT, method, **own_parameters(scheme, method)) is model
    torch.testing.assert_close(model(**short)[0], before, atol=1e-12, rtol=0)
    output = model(**long)[0]
    assert output.isfinite().all()
    assert model.config.max_position_embeddings == 5 * CONTEXT

    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert loaded.config.position_extension == model.config.position_extension
    torch.testing.assert_close(loaded(**long)[0], output, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("scheme", "method"), METHODS)
def test_it_is_the_model_that_a_config_of_the_longer_context_describes(build_tiny_model, scheme, method):
    extension = None
    if method:
        extension = {"method": method, "original_max_position_embeddings": CONTEXT, **own_parameters(scheme, method)}
    expected = build(build_tiny_model, scheme, context=4 * CONTEXT, position_extension=extension)
    model = build(build_tiny_model, scheme).extend_context(4 * CONTEXT, method, **own_parameters(scheme, method))
    assert model.config.position_extension == expected.config.position_extension
    weights = model.state_dict()
    assert {n: t.shape for n, t in weights.items()} == {n: t.shape for n, t in expected.state_dict().items()}
    expected.load_state_dict(weights)
    documents = batch(4 * CONTEXT, 9)
    assert torch.equal(model(**documents)[0], expected(**documents)[0])


def trained(model):
    """Every parameter moved a little, as training would."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("scheme", "first", "then"),
    [
        ("absolute", "repeat", "repeat"),
        ("absolute", "repeat", None),
        ("absolute", "interpolate", "repeat"),
        ("absolute", "restart", "restart"),
        ("sinusoidal", "restart", None),
        ("alibi", None, None),
        ("relative", None, None),
    ],
)
def test_a_model_that_is_extended_again_reads_what_it_could_as_before(build_tiny_model, tmp_path, scheme, first, then):
    model = trained(build(build_tiny_model, scheme).extend_context(4 * CONTEXT, first, **parameters(first)))
    model.save_pretrained(tmp_path)
    model = LongEmbedModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    documents = batch(4 * CONTEXT, CONTEXT, 5, CONTEXT + 1)
    before = model(**documents)[0]
    model.extend_context(16 * CONTEXT, then)
    torch.testing.assert_close(model(**documents)[0], before, atol=1e-12, rtol=0)
    assert model(**batch(16 * CONTEXT))[0].isfinite().all()
    model.save_pretrained(tmp_path / "again")
    loaded = LongEmbedModel.from_pretrained(tmp_path / "again", dtype=torch.float64).eval()
    torch.testing.assert_close(loaded(**documents)[0], before, atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", POSITION_SCHEMES["rope"].extensions)
def test_rope_stretches_further_from_the_original_context(build_tiny_model, method):
    twice = build(build_tiny_model, "rope").extend_context(2 * CONTEXT, method, **parameters(method))
    twice.extend_context(8 * CONTEXT)
    once = build(build_tiny_model, "rope").extend_context(8 * CONTEXT, method, **parameters(method))
    assert twice.config.position_extension == once.config.position_extension
    assert twice.config.position_extension["original_max_position_embeddings"] == CONTEXT
    documents = batch(8 * CONTEXT, CONTEXT)
    assert torch.equal(twice(**documents)[0], once(**documents)[0])


@pytest.mark.parametrize(
    ("scheme", "patterns", "method"),
    [
        ("absolute", "full", "repeat"),
        ("absolute", {"type": "block", "size": 8}, "restart"),
        ("rope", "full", "dynamic"),
    ],
)
def test_the_default_is_what_needs_no_training(build_tiny_model, scheme, patterns, method):
    model = build(build_tiny_model, scheme, attention_patterns=patterns).extend_context(4 * CONTEXT)
    assert model.config.position_extension["method"] == method


def test_the_table_keeps_its_dtype_and_whether_it_trains(build_tiny_model):
    model = build(build_tiny_model, "absolute").to(torch.bfloat16)
    model.embeddings.position_embeddings.weight.requires_grad_(False)
    model.extend_context(64, "repeat")
    table = model.embeddings.position_embeddings.weight
    assert (table.dtype, table.requires_grad, len(table)) == (torch.bfloat16, False, 64)
    assert torch.equal(table[CONTEXT : 2 * CONTEXT], table[:CONTEXT])


def test_what_cannot_be_extended_is_refused_and_the_model_is_unchanged(build_tiny_model):
    def refuse(model, words, *args, **kwargs):
        fields, weights = model.config.to_dict(), {n: t.clone() for n, t in model.state_dict().items()}
        with pytest.raises(ValueError, match=words) as error:
            model.extend_context(*args, **kwargs)
        assert "\n" not in str(error.value)
        assert model.config.to_dict() == fields
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())

    absolute = build(build_tiny_model, "absolute")
    for length in (CONTEXT, 8, "64", 64.0):
        refuse(absolute, r"^extend_context: max_position_embeddings=.* above the context of 16 tokens", length)
    refuse(absolute, r"^position_extension: the method 'yarn' is not defined for .*'absolute'", 64, "yarn")
    refuse(absolute, r"^position_extension: the method 'repeat' has no parameter 'factor'", 64, "repeat", factor=2)
    refuse(build(build_tiny_model, "alibi"), r"^position_extension: 'alibi' positions have no trained", 64, "linear")
    absolute.extend_context(64, "interpolate")
    refuse(absolute, r"^extend_context: the rows of this table were trained .* use method='repeat'", 128, "interpolate")
    rope = build(build_tiny_model, "rope").extend_context(64, "yarn")
    refuse(rope, r"^extend_context: this model is extended by 'yarn' from 16 tokens, which 'linear' can", 128, "linear")
