"""Random checkpoints of every architecture that we read, with a tokenizer of a few words."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    BertConfig,
    DistilBertConfig,
    LongformerConfig,
    ModernBertConfig,
    MPNetConfig,
    NomicBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)

CONTEXT = 40
WORDS = [f"w{n}" for n in range(60)]
VOCAB_SIZE = len(WORDS) + 5
# What a folder that a model of ours is saved to holds beside its code.
SAVED_BESIDE_CODE = {
    "README.md",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

PARAGRAPH = (
    "The committee met in the morning to discuss the budget for the coming year. Several members asked for more money "
    "for roads and schools, while others thought that taxes are high enough. Nobody mentioned the bridge that closed. "
)

CONFIGS = {
    "bert": BertConfig(**SIZES, vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT, pad_token_id=0),
    "roberta": RobertaConfig(**SIZES, vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT + 2, pad_token_id=1),
    "xlm-roberta": XLMRobertaConfig(
        **SIZES, vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT + 2, pad_token_id=1, type_vocab_size=1
    ),
    "distilbert": DistilBertConfig(
        vocab_size=VOCAB_SIZE,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=48,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
    ),
    "mpnet": MPNetConfig(**SIZES, vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT + 2, pad_token_id=1),
    "longformer": LongformerConfig(
        **SIZES,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=CONTEXT + 2,
        pad_token_id=1,
        type_vocab_size=1,
        attention_window=[4, 8],
    ),
    "modernbert": ModernBertConfig(
        **(SIZES | {"num_hidden_layers": 4}),
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=CONTEXT,
        local_attention=8,
        global_attn_every_n_layers=3,
        **(SPECIAL | {"cls_token_id": 1, "sep_token_id": 2}),
    ),
    "nomic_bert": NomicBertConfig(**SIZES, vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT, pad_token_id=0),
}


def tiny_tokenizer(pad_token_id: int) -> PreTrainedTokenizerFast:
    """`[CLS] w3 w17 [SEP]`: one token a word; other words are unknown."""
    special = ["[CLS]", "[SEP]", "[UNK]", "[MASK]"]
    special.insert(pad_token_id, "[PAD]")
    vocab = {word: number for number, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        pad_token="[PAD]",
        model_max_length=CONTEXT,
    )


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter away from its initial value: a bias that is always zero would hide one that is forgotten."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.2 * noise if "norm" in name.lower() and name.endswith("weight") else 0.2 * noise)
    return model.eval()


def save_checkpoint(folder, family: str, with_head: bool = False, **changes):
    """Writes a random checkpoint with its tokenizer; returns the original model (eager attention, fp32)."""
    config = type(CONFIGS[family]).from_dict(CONFIGS[family].to_dict() | changes)
    auto = AutoModelForMaskedLM if with_head else AutoModel
    model = randomize(auto.from_config(config, attn_implementation="eager"))
    model.save_pretrained(folder)
    tiny_tokenizer(config.pad_token_id).save_pretrained(folder)
    return model


def leave_out_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save folders without a copy of the package, which takes most of the time of saving a tiny model."""
    for module in ("modeling_utils", "configuration_utils"):
        monkeypatch.setattr(f"transformers.{module}.custom_object_save", lambda *args, **kwargs: [])


def random_batch(lengths: list[int], pad_token_id: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Right-padded documents of the given lengths in tokens, without the padding id inside."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, VOCAB_SIZE, (len(lengths), max(lengths)), generator=generator)
    attention_mask = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
    return {"input_ids": input_ids.where(attention_mask == 1, pad_token_id), "attention_mask": attention_mask}


def random_text(words: int, seed: int = 0) -> str:
    """So many words of the vocabulary: `words + 2` tokens."""
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[n] for n in torch.randint(len(WORDS), (words,), generator=generator))


def largest_difference(ours, theirs, attention_mask):
    """The largest difference of two outputs `(B, S, ...)` at tokens that are no padding."""
    return (ours - theirs)[attention_mask == 1].abs().max().item()


def one_sentence(error) -> str:
    """The message of an error that pytest caught, on one line."""
    message = str(error.value)
    assert message
    assert "\n" not in message
    return message
