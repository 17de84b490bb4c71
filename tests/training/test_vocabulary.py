"""A trimmed vocabulary: the corpus is cut into the same pieces and has the same vectors, and less is left."""

import json
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common.errors import UserError
from modeling_longembed import LongEmbedModel
from tests.training.tiny_training import tiny_config, write_jsonl
from training import vocabulary

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
NAMES = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIALS, strict=True))


def words(count: int, seed: int, letters: str = "abcdefghijklmnop") -> list[str]:
    draw = random.Random(seed)
    stems = ["".join(draw.choices(letters, k=draw.randint(2, 5))) for _ in range(40)]
    return ["".join(draw.choices(stems, k=draw.randint(1, 3))) for _ in range(count)]


def character(piece: str) -> bool:
    """Whether it is one letter, at the start of a word or inside."""
    return len(piece.removeprefix("##").removeprefix("\u2581")) <= 1


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of 400 pieces, learnt from many words; special tokens in the middle of the ids for WordPiece."""
    if kind == "WordPiece":
        core, trainer = Tokenizer(models.WordPiece(unk_token="[UNK]")), trainers.WordPieceTrainer
        core.decoder = decoders.WordPiece()
    elif kind == "Unigram":
        core, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer
    else:
        core, trainer = Tokenizer(models.BPE(unk_token="[UNK]")), trainers.BpeTrainer
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Metaspace() if kind == "Unigram" else pre_tokenizers.Whitespace()
    options = {"unk_token": "[UNK]"} if kind == "Unigram" else {}
    corpus = [" ".join(words(2000, seed)) for seed in range(3)]
    core.train_from_iterator(corpus, trainer(vocab_size=400, special_tokens=SPECIALS, **options))
    special = [(token, core.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=128, **NAMES)


@pytest.fixture(params=["WordPiece", "Unigram"])
def subword_model_folder(request, tmp_path):
    tokenizer = trained(request.param)
    torch.manual_seed(0)
    model = LongEmbedModel(
        tiny_config(vocab_size=len(tokenizer), initializer_range=0.3, prompts={"query": "abcd zzz: "})
    )
    model.tokenizer = tokenizer
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def corpus() -> list[str]:
    return [" ".join(words(30, seed)) for seed in (0, 1, 1, 2)] + ["ABC ponk, été 17"]


@pytest.fixture
def trim(subword_model_folder, corpus, tmp_path):
    def run(options: str = ""):
        data = write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in corpus])
        given = f"--model_name_or_path {subword_model_folder} --train_data {data} --output_dir {tmp_path}/out "
        vocabulary.main((given + options).split())
        return LongEmbedModel.from_pretrained(subword_model_folder), LongEmbedModel.from_pretrained(
            tmp_path / "out" / "final"
        )

    return run


def test_the_corpus_has_the_same_pieces_and_the_same_vectors(trim, corpus):
    whole, small = trim()
    assert len(small.tokenizer) == small.config.vocab_size < len(whole.tokenizer)
    for text in corpus:
        pieces = [model.tokenizer.convert_ids_to_tokens(model.tokenizer(text)["input_ids"]) for model in (whole, small)]
        assert pieces[0] == pieces[1]
    for prompt in ("query", "document"):
        vectors = [model.encode(corpus, prompt_name=prompt) for model in (whole, small)]
        assert np.array_equal(*(np.asarray(rows) for rows in vectors))


def test_every_row_that_is_left_is_the_one_of_its_piece(trim):
    whole, small = trim()
    old, new = whole.tokenizer.get_vocab(), small.tokenizer.get_vocab()
    assert sorted(new.values()) == list(range(len(new)))
    tables = [model.get_input_embeddings().weight for model in (whole, small)]
    for piece, number in new.items():
        assert torch.equal(tables[1][number], tables[0][old[piece]])
    assert set(SPECIALS) <= new.keys()
    for name in NAMES:
        assert getattr(small.tokenizer, name) == NAMES[name]
    assert small.config.pad_token_id == small.tokenizer.pad_token_id
    assert small.tokenizer.decode(small.tokenizer("abc")["input_ids"]).count("[CLS]") == 1


def test_a_piece_stays_if_it_occurs_or_is_a_character(trim, corpus):
    """By counting anew: nothing else stays, so that the model is as small as it can be."""
    whole, small = trim()
    used = {piece for text in [*corpus, "abcd zzz: "] for piece in whole.tokenizer.tokenize(text)}
    for piece in whole.tokenizer.get_vocab():
        expected = piece in used or piece in SPECIALS or character(piece)
        assert (piece in small.tokenizer.get_vocab()) == expected


def test_a_word_of_rare_pieces_is_spelled_in_smaller_ones(trim, corpus):
    whole, small = trim("--min_count 3")
    counts: dict[str, int] = {}
    for text in corpus:
        for piece in whole.tokenizer.tokenize(text):
            counts[piece] = counts.get(piece, 0) + 1
    kept_anyway = {*whole.tokenizer.tokenize("abcd zzz: "), *SPECIALS}
    rare = [piece for piece, count in counts.items() if count < 3 and not character(piece)]
    rare = [piece for piece in rare if piece not in kept_anyway]
    assert rare
    assert not set(rare) & small.tokenizer.get_vocab().keys()
    unknown = small.tokenizer.unk_token_id
    for text in corpus[:4]:
        assert unknown not in small.tokenizer(text)["input_ids"]
        kept = [piece for piece in whole.tokenizer.tokenize(text) if piece not in rare]
        assert len(small.tokenizer.tokenize(text)) >= len(kept)


def test_prompts_keep_their_pieces_and_nothing_else_is_left_behind(
    trim, subword_model_folder, corpus, tmp_path, capsys
):
    """A prompt of a piece that the corpus has not, which stays, and has no part in the share of the corpus."""
    model = LongEmbedModel.from_pretrained(subword_model_folder)
    used = {piece for text in corpus for piece in model.tokenizer.tokenize(text)}
    unused = (piece.removeprefix("\u2581") for piece in sorted(model.tokenizer.get_vocab()) if piece not in used)
    word = next(
        each for each in unused if len(each) > 2 and each.isalpha() and len(model.tokenizer.tokenize(each)) == 1
    )
    model.config.prompts = {"query": f"{word} "}
    model.save_pretrained(subword_model_folder)
    whole, small = trim("--min_count 2")
    assert small.tokenizer.tokenize(f"{word} ") == whole.tokenizer.tokenize(f"{word} ") != []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["final"]
    numbers = [number for text in corpus for number in whole.tokenizer(text, add_special_tokens=False)["input_ids"]]
    pieces = whole.tokenizer.convert_ids_to_tokens(numbers)
    share = sum(piece in small.tokenizer.get_vocab() for piece in pieces) / len(pieces)
    assert share < 1
    assert f"; {share:.2%} of the tokens of the corpus" in capsys.readouterr().out


@pytest.mark.parametrize("processor", [processors.BertProcessing, processors.RobertaProcessing])
def test_special_tokens_are_where_they_were(processor):
    """In front, at the end and as padding, under their new numbers, for the processors of BERT and RoBERTa."""
    pieces = ["aaa", "a", "b", "##a", "##b", "bb", *SPECIALS]
    core = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processor(("[SEP]", pieces.index("[SEP]")), ("[CLS]", pieces.index("[CLS]")))
    core.enable_padding(pad_id=pieces.index("[PAD]"), pad_token="[PAD]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **NAMES)
    counts = np.zeros(len(pieces), np.int64)
    counts[pieces.index("bb")] = 1
    small = vocabulary.trim_tokenizer(tokenizer, vocabulary.tokens_to_keep(tokenizer, counts, 1))
    assert sorted(small.get_vocab()) == sorted(piece for piece in pieces if piece != "aaa")
    assert small.backend_tokenizer.padding["pad_id"] == small.pad_token_id
    for texts in (["bb a"], ["a", "bb a"]):
        before, after = (
            [each.convert_ids_to_tokens(row) for row in each(texts, padding=True)["input_ids"]]
            for each in (tokenizer, small)
        )
        assert after == before


def test_bytes_stay_so_that_every_character_can_be_spelled():
    byte_pieces = [(f"<0x{number:02X}>", -20.0) for number in range(256)]
    core = Tokenizer(
        models.Unigram([("[UNK]", 0.0), ("abc", -2.0), ("a", -5.0), *byte_pieces], unk_id=0, byte_fallback=True)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    keep = vocabulary.tokens_to_keep(tokenizer, np.zeros(259, np.int64), 1)
    small = vocabulary.trim_tokenizer(tokenizer, keep)
    assert len(small) == 258
    assert small.tokenize("aé") == tokenizer.tokenize("aé") == ["a", "<0xC3>", "<0xA9>"]


def test_a_tokenizer_that_merges_is_refused(tmp_path):
    tokenizer = trained("BPE")
    with pytest.raises(UserError, match="the vocabulary of a BPE tokenizer cannot be trimmed"):
        vocabulary.trim_tokenizer(tokenizer, np.arange(10))


def test_the_real_minilm_keeps_its_vectors(minilm, tmp_path):
    """With BERT's own tokenizer, whose special tokens stand between others."""
    texts = ["Rivers carry stones to the sea.", "What does a winter garden cost? About 1,000 dollars (naïve)."]
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    counts = np.zeros(len(tokenizer), np.int64)
    np.add.at(counts, [number for text in texts for number in tokenizer(text)["input_ids"]], 1)
    keep = vocabulary.tokens_to_keep(tokenizer, counts, 1)
    model = LongEmbedModel.from_encoder(minilm)
    before = np.asarray(model.encode(texts))
    vocabulary.trim_embeddings(model, keep)
    model.tokenizer = vocabulary.trim_tokenizer(tokenizer, keep)
    assert len(model.tokenizer) == len(keep) < 3000
    assert np.array_equal(np.asarray(model.encode(texts)), before)
    model.save_pretrained(tmp_path)
    assert np.array_equal(np.asarray(LongEmbedModel.from_pretrained(tmp_path).encode(texts)), before)
    rows = load_file(tmp_path / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert len(rows) == len(keep) == json.loads((tmp_path / "config.json").read_text())["vocab_size"]
