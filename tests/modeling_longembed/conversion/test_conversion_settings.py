"""sentence-transformers' files beside a checkpoint: every field is taken over, or refused by its name.

The oracle is `SentenceTransformer(original).encode`, and the list of fields is that of the installed release.
"""

import inspect
import json
import shutil

import numpy as np
import pytest
from tokenizers import normalizers
from transformers import AutoTokenizer

from modeling_longembed import LongEmbedModel
from tests.modeling_longembed.tiny_checkpoints import CONTEXT, random_text, save_checkpoint

st = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")

TEXTS = [random_text(20), random_text(7, seed=1), "w5", "W5 w7"]
PROMPTS = {"query": "w1 w2 ", "document": "w9 ", "passage": "w3 "}
MODEL, TRANSFORMER = "config_sentence_transformers.json", "sentence_bert_config.json"
POOLING, NORMALIZE = "1_Pooling/config.json", "2_Normalize/config.json"
# For each file a value of each field that is not that of the original below; some of them have an effect on a vector.
VALUES = {
    MODEL: {
        "model_type": "SparseEncoder",
        "prompts": {"query": "w4 ", "document": "w8 w9 ", "title": "w1 "},
        "default_prompt_name": "query",
        "similarity_fn_name": "dot",
        "truncate_dim": 8,
        "__version__": {"sentence_transformers": "1.0.0"},
        "requirements": {"torch": ">=1.0"},
    },
    TRANSFORMER: {
        "transformer_task": "fill-mask",
        "modality_config": {"text": {"method": "forward", "method_output_name": "pooler_output"}},
        "module_output_name": "sentence_embedding",
        "processing_kwargs": {"text": {"max_length": 3}},
        "unpad_inputs": False,
        "query_length": 4,
        "document_length": 4,
        "query_expansion": {"strategy": "fixed", "length": 32},
        "model_kwargs": {"output_hidden_states": True},
        "processor_kwargs": {"do_lower_case": True},
        "config_kwargs": {"hidden_act": "relu"},
        "model_args": {"output_hidden_states": True},
        "tokenizer_args": {"do_lower_case": True},
        "config_args": {"hidden_act": "relu"},
        "max_seq_length": 12,
        "do_lower_case": True,
        "tokenizer_name_or_path": "org/other",
    },
    POOLING: {
        "embedding_dimension": 48,
        "word_embedding_dimension": 48,
        "pooling_mode": "cls",
        "include_prompt": False,
        "pooling_mode_cls_token": True,
        "pooling_mode_max_tokens": True,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_mean_sqrt_len_tokens": True,
        "pooling_mode_weightedmean_tokens": True,
        "pooling_mode_lasttoken": True,
    },
    NORMALIZE: {"module_input_name": "token_embeddings", "module_output_name": "normalized"},
}
# Arguments of the constructors that no file holds.
NOT_SAVED = {"self", "model_name_or_path", "backend", "args", "kwargs"}


def known_fields() -> dict[str, set[str]]:
    """The fields of each file that the installed sentence-transformers reads or writes."""
    reference = st.SentenceTransformer(modules=[modules.Normalize()], device="cpu", truncate_dim=8)
    pooling = {*modules.Pooling.config_keys, *modules.Pooling.config_key_renames}
    pooling |= {*inspect.getmodule(modules.Pooling)._LEGACY_POOLING_MODE_KWARGS}
    constructor = inspect.signature(inspect.unwrap(modules.Transformer.__init__)).parameters
    return {
        MODEL: {*reference._get_model_config(), "requirements"},
        TRANSFORMER: {*modules.Transformer.config_keys, *constructor} - NOT_SAVED,
        POOLING: pooling,
        NORMALIZE: {*modules.Normalize.config_keys},
    }


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A cased checkpoint of sentence-transformers with all four files, whose settings are the default ones."""
    folder = tmp_path_factory.mktemp("original") / "model"
    save_checkpoint(folder, "bert")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    tokenizer.save_pretrained(folder)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    rows = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(kinds)
    ]
    write(folder / "modules.json", rows)
    write(folder / MODEL, {"prompts": PROMPTS, "default_prompt_name": None, "similarity_fn_name": "cosine"})
    write(folder / TRANSFORMER, {"max_seq_length": CONTEXT, "do_lower_case": False})
    write(folder / POOLING, {"word_embedding_dimension": 32, "pooling_mode": "mean", "include_prompt": True})
    write(folder / NORMALIZE, {})
    return folder


def write(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def edit(path, **fields):
    write(path, json.loads(path.read_text()) | fields)


@pytest.fixture
def copy(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


def reference_vectors(reference):
    return {name: reference.encode(TEXTS, prompt_name=name) for name in (None, *reference.prompts)}


def check_same_vectors(folder, model):
    reference = st.SentenceTransformer(str(folder), device="cpu")
    assert model.config.similarity_fn_name == reference.similarity_fn_name
    assert model.config.default_prompt_name == reference.default_prompt_name
    for name, expected in reference_vectors(reference).items():
        np.testing.assert_allclose(model.encode(TEXTS, prompt_name=name, precision="float32"), expected, atol=1e-5)


def refused(folder, *named):
    with pytest.raises(ValueError, match="cannot be converted") as error:
        LongEmbedModel.from_encoder(folder)
    message = str(error.value)
    assert "\n" not in message
    assert all(name in message for name in named), message


@pytest.mark.parametrize("file", VALUES)
def test_every_field_of_the_installed_release_has_a_value_here(file):
    assert known_fields()[file] <= set(VALUES[file])


@pytest.mark.parametrize("file", VALUES)
def test_every_value_here_is_another_one_than_that_of_the_original(file, original):
    settings = json.loads((original / file).read_text())
    assert not [field for field, value in VALUES[file].items() if field in settings and settings[field] == value]


def test_every_field_of_modules_json_is_read(copy, tmp_path):
    """`kwargs` is refused below; a release writes the others, of which `path` and `type` say what to load."""
    st.SentenceTransformer(modules=[modules.Normalize()], device="cpu").save(str(tmp_path / "saved"))
    written = json.loads((tmp_path / "saved" / "modules.json").read_text())
    assert {*written[0]} <= {"idx", "name", "path", "type"}
    rows = json.loads((copy / "modules.json").read_text())
    edit(copy / POOLING, pooling_mode="cls")
    (copy / "1_Pooling").rename(copy / "moved")
    rows = [row | {"idx": row["idx"] + 7, "name": f"{row['idx']}_other"} for row in rows]
    write(copy / "modules.json", [rows[0], rows[1] | {"path": "moved"}, rows[2]])
    model = LongEmbedModel.from_encoder(copy)
    assert model.config.pooling == "cls"
    check_same_vectors(copy, model)


@pytest.mark.parametrize(("file", "field"), [(file, field) for file, fields in VALUES.items() for field in fields])
def test_every_field_is_taken_over_or_refused_by_name(file, field, copy):
    edit(copy / file, **{field: VALUES[file][field]})
    if file == POOLING and field.startswith("pooling_mode_"):
        edit(copy / file, pooling_mode=None)
        write(copy / file, {k: v for k, v in json.loads((copy / file).read_text()).items() if v is not None})
    # The length of a converted model is the caller's choice; a shorter one of the original is only said.
    length = VALUES[file][field] if field == "max_seq_length" else None
    try:
        model, message = LongEmbedModel.from_encoder(copy, length), ""
    except ValueError as error:
        model, message = None, str(error)
    if model is not None:
        check_same_vectors(copy, model)
    else:
        assert message.startswith("this checkpoint cannot be converted")
        assert (field.removeprefix("pooling_mode_") if file == POOLING else field) in message
        assert "\n" not in message


@pytest.mark.parametrize("file", VALUES)
def test_a_field_of_a_later_release_is_refused_unless_it_is_off(file, copy):
    edit(copy / file, later=None, never=False)
    LongEmbedModel.from_encoder(copy)
    edit(copy / file, later=3)
    refused(copy, "later=3", file)


def test_every_module_of_the_installed_release_is_taken_over_or_refused_by_name(copy):
    kinds = [kind for kind in modules.__all__ if inspect.isclass(getattr(modules, kind, None))]
    assert {"Dense", "LayerNorm", "WordEmbeddings", "WeightedLayerPooling", "Router"} <= {*kinds}
    rows = json.loads((copy / "modules.json").read_text())
    for kind in set(kinds) - {"Transformer", "Pooling", "Normalize", "Dropout", "InputModule", "Module"}:
        extra = {"idx": 3, "name": "3", "path": f"3_{kind}", "type": f"sentence_transformers.models.{kind}"}
        write(copy / "modules.json", [*rows, extra])
        refused(copy, kind)
    for wrong in ([rows[0], rows[2]], [rows[1], rows[0]], [*rows, rows[1]]):
        write(copy / "modules.json", wrong)
        refused(copy, "in this order")
    write(copy / "modules.json", [rows[0] | {"type": "custom_st.Transformer"}, *rows[1:]])
    refused(copy, "custom_st.Transformer")
    write(copy / "modules.json", [rows[0] | {"kwargs": ["task"]}, *rows[1:]])
    refused(copy, "kwargs", "modules.json")


def test_dropout_between_the_modules_has_no_effect(copy):
    rows = json.loads((copy / "modules.json").read_text())
    extra = {"idx": 3, "name": "3", "path": "3_Dropout", "type": "sentence_transformers.models.Dropout"}
    write(copy / "modules.json", [*rows, extra])
    write(copy / "3_Dropout" / "config.json", {"dropout": 0.5})
    check_same_vectors(copy, LongEmbedModel.from_encoder(copy))


def test_what_is_saved_is_served_as_the_original_was(copy, tmp_path):
    """A dot model without Normalize, in lower case, with a default prompt: everything that the conversion can lose."""
    write(copy / "modules.json", json.loads((copy / "modules.json").read_text())[:2])
    edit(copy / MODEL, default_prompt_name="passage", similarity_fn_name="dot")
    edit(copy / TRANSFORMER, do_lower_case=True)
    edit(copy / POOLING, pooling_mode="cls")
    expected = reference_vectors(st.SentenceTransformer(str(copy), device="cpu"))
    assert set(expected) == {None, "query", "document", "passage"}
    assert min(np.abs(np.linalg.norm(vectors, axis=1) - 1).min() for vectors in expected.values()) > 0.1
    LongEmbedModel.from_encoder(copy).save_pretrained(tmp_path / "ours")
    served = st.SentenceTransformer(str(tmp_path / "ours"), device="cpu", trust_remote_code=True)
    assert served.similarity_fn_name == "dot"
    for name, vectors in expected.items():
        np.testing.assert_allclose(served.encode(TEXTS, prompt_name=name), vectors, atol=1e-5)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"document": "", "passage": "w3 "}, {"query": "", "document": "", "passage": "w3 "}),
        ({"query": "w1 ", "passage": "w3 "}, {"query": "w1 ", "document": "w3 ", "passage": "w3 "}),
        ({"corpus": "w4 ", "passage": "w3 "}, {"query": "", "document": "w3 ", "passage": "w3 ", "corpus": "w4 "}),
        ({"query": None, "x": "w5 "}, {"query": "", "document": "", "x": "w5 "}),
        ({}, {"query": "", "document": ""}),
    ],
)
def test_prompts_keep_their_names_and_documents_get_theirs(theirs, ours, copy):
    edit(copy / MODEL, prompts=theirs)
    assert LongEmbedModel.from_encoder(copy).config.prompts == ours


def test_what_the_caller_chooses_takes_the_place_of_a_setting(copy):
    edit(copy / POOLING, pooling_mode="max", include_prompt=False)
    edit(copy / MODEL, similarity_fn_name="dot", default_prompt_name="query")
    choices = {"pooling": "cls", "normalize": False, "similarity_fn_name": "cosine", "prompts": {"query": "w9 "}}
    config = LongEmbedModel.from_encoder(copy, **choices).config
    assert (config.pooling, config.normalize, config.similarity_fn_name) == ("cls", False, "cosine")
    assert (config.prompts, config.default_prompt_name) == ({"query": "w9 ", "document": ""}, None)


def test_settings_without_modules_are_not_read(copy):
    """sentence-transformers takes the mean of a checkpoint without modules.json, whatever else lies beside it."""
    (copy / "modules.json").unlink()
    edit(copy / POOLING, pooling_mode="cls")
    edit(copy / MODEL, default_prompt_name="query")
    model = LongEmbedModel.from_encoder(copy)
    expected = st.SentenceTransformer(str(copy), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(model.encode(TEXTS, normalize=False, precision="float32"), expected, atol=1e-5)


def test_the_settings_of_other_architectures_have_other_file_names(copy):
    (copy / TRANSFORMER).rename(copy / "sentence_xlm-roberta_config.json")
    edit(copy / "sentence_xlm-roberta_config.json", do_lower_case=True)
    check_same_vectors(copy, LongEmbedModel.from_encoder(copy))


def test_a_shorter_length_of_the_original_is_said(copy, capsys):
    edit(copy / TRANSFORMER, max_seq_length=12)
    LongEmbedModel.from_encoder(copy)
    assert f"cuts texts off after 12 tokens, this model after {CONTEXT}\n" in capsys.readouterr().out
    check_same_vectors(copy, LongEmbedModel.from_encoder(copy, 12))


@pytest.mark.parametrize("normalizer", [normalizers.Lowercase(), normalizers.BertNormalizer(lowercase=True)])
def test_a_tokenizer_in_lower_case_already_stays_what_it_is(normalizer, copy):
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.backend_tokenizer.normalizer = normalizer
    tokenizer.save_pretrained(copy)
    edit(copy / TRANSFORMER, do_lower_case=True)
    model = LongEmbedModel.from_encoder(copy)
    assert model.tokenizer.backend_tokenizer.to_str() == AutoTokenizer.from_pretrained(copy).backend_tokenizer.to_str()
    check_same_vectors(copy, model)


def test_a_tokenizer_that_reads_otherwise_is_refused(copy):
    edit(copy / "tokenizer_config.json", truncation_side="left")
    refused(copy, "truncation_side='left'", "tokenizer_config.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_max_length", 9),  # sentence-transformers takes max_seq_length of its own file
        ("do_lower_case", True),
        ("strip_accents", True),
        ("add_prefix_space", True),
        ("clean_up_tokenization_spaces", True),
        ("extra_special_tokens", ["w5"]),
        ("cls_token", "w1"),
        ("pad_token", "[UNK]"),
        ("model_input_names", ["input_ids", "attention_mask"]),
        ("tokenizer_class", "BertTokenizerFast"),
    ],
)
def test_a_setting_of_the_tokenizer_is_taken_over(field, value, copy):
    edit(copy / "tokenizer_config.json", **{field: value})
    check_same_vectors(copy, LongEmbedModel.from_encoder(copy))


def test_a_text_is_encoded_as_by_itself_where_the_original_pads_on_the_left(copy):
    """In a batch the positions of the original begin at the padding, so that its vectors depend on the other texts."""
    edit(copy / "tokenizer_config.json", padding_side="left")
    alone = st.SentenceTransformer(str(copy), device="cpu").encode(TEXTS, batch_size=1)
    ours = LongEmbedModel.from_encoder(copy).encode(TEXTS, precision="float32")
    np.testing.assert_allclose(ours, alone, atol=1e-5)


def test_a_tokenizer_that_gives_other_segments_is_refused(copy):
    state = json.loads((copy / "tokenizer.json").read_text())
    for piece in state["post_processor"]["single"]:
        next(iter(piece.values()))["type_id"] = 1
    write(copy / "tokenizer.json", state)
    edit(copy / "tokenizer_config.json", model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    refused(copy, "segments [1, 1, 1]")
