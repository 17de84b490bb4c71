"""Trim the vocabulary of a LongEmbed model to a corpus: embeddings of tokens that no text uses are removed.

python training/vocabulary.py --model_name_or_path MODEL --train_data documents.jsonl --output_dir runs/trimmed

In a small model most parameters are word embeddings, of which a corpus of one field or language uses a part. The texts
of the corpus are split into the same tokens as before and have the same vectors. The trimmed vocabulary keeps special
and added tokens, the tokens of the prompts, tokens that occur in the corpus, and single characters, so that a new word
can be spelled. With `--min_count` above 1 rare tokens are removed too, and texts that contain them are split into
smaller ones. A word that was [UNK], because WordPiece took the longest token and then found none for the rest, may now
be split, because another token is the longest.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from common.arguments import parse
from common.errors import UserError, run
from training.data.documents.token_store import tokenize_documents
from training.data.sources import Columns, read_sources
from training.engine.record import record
from training.engine.saving import save
from training.models.encoder import ModelArguments, load_encoder

# Matches a token without the mark that its tokenizer sets at the start or in the middle of a word.
_BARE = re.compile(r"^(?:##|\u2581)?(.*)$", re.DOTALL)


@dataclass
class VocabularyArguments:
    """The corpus, and how often a token must occur.

    Raises:
        UserError: the count is not positive.
    """

    train_data: list[str] = field(
        metadata={"help": "the corpus: .jsonl, .jsonl.gz, .parquet, a folder of these, or org/name on the Hub"}
    )
    output_dir: str = field(metadata={"help": "folder of final/, the trimmed model", "output": "folder"})
    text_column: str = field(default="text", metadata={"help": "the column that holds the texts"})
    min_count: int = field(default=1, metadata={"help": "occurrences that a token needs to be kept"})

    def __post_init__(self) -> None:
        if self.min_count < 1:
            raise UserError(f"--min_count {self.min_count}: must be at least 1")


def tokens_to_keep(tokenizer: PreTrainedTokenizerBase, counts: np.ndarray, min_count: int) -> np.ndarray:
    """Return the ids of the tokens to keep, ascending.

    Args:
        tokenizer: tokenizer of the model.
        counts: `(vocab_size,)`, how often each id occurs.
        min_count: how often an id must occur.
    """
    keep = counts >= min_count
    for token, number in tokenizer.get_vocab().items():
        bare = _BARE.match(token)
        if (bare and len(bare[1]) <= 1) or re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            keep[number] = True
    keep[[*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder]] = True
    return keep.nonzero()[0]


def trim_tokenizer(tokenizer: PreTrainedTokenizerBase, keep: np.ndarray) -> PreTrainedTokenizerBase:
    """Return a tokenizer that has only the ids `keep`, renumbered 0, 1, ... in their order.

    WordPiece takes the longest token that fits, and Unigram the most probable split of a word, so both choose the same
    tokens when others are removed. (Only a word that WordPiece could not split may change.)

    Raises:
        UserError: the tokenizer may split texts differently after trimming, as BPE, which builds tokens by merging
            others.
    """
    new_id = {int(old): new for new, old in enumerate(keep)}
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        file = Path(folder, "tokenizer.json")
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        model = content.get("model", {})
        kind = model.get("type")
        if kind in ("WordPiece", "WordLevel"):
            model["vocab"] = {token: new_id[number] for token, number in model["vocab"].items() if number in new_id}
        elif kind == "Unigram":
            model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new_id]
            model["unk_id"] = new_id[model["unk_id"]]
        else:
            raise UserError(
                f"the vocabulary of a {kind or 'slow'} tokenizer cannot be trimmed; WordPiece, WordLevel and Unigram "
                "ones can"
            )
        for token in content["added_tokens"]:
            token["id"] = new_id[token["id"]]
        if content.get("padding"):
            content["padding"]["pad_id"] = new_id[content["padding"]["pad_id"]]
        _renumber(content.get("post_processor"), new_id)
        file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        settings = json.loads(Path(folder, "tokenizer_config.json").read_text(encoding="utf-8"))
        settings.pop("added_tokens_decoder", None)  # tokenizer.json has them too
        Path(folder, "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        for other in Path(folder).iterdir():
            if other.suffix != ".json":  # a file of the old vocabulary in another format
                other.unlink()
        return AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def trim_embeddings(model: Any, keep: np.ndarray) -> None:
    """Remove the embeddings of all ids but `keep`, in place."""
    table, config = model.get_input_embeddings(), model.config
    places = torch.from_numpy(keep)
    pad = config.pad_token_id
    if pad is not None:
        config.pad_token_id = int(np.searchsorted(keep, pad)) if pad in keep else None
    trimmed = nn.Embedding(len(keep), table.embedding_dim, padding_idx=config.pad_token_id)
    trimmed.weight.copy_(table.weight[places])
    model.set_input_embeddings(trimmed)
    if model.token_output.query_table is not None:
        model.token_output.set_table(model.token_output.query_table[places])
    config.vocab_size = len(keep)


def main(argv: Sequence[str] | None = None) -> None:
    """Trim and write with the command-line options `argv`; None: those of the process."""
    model_args, args = parse(ModelArguments, VocabularyArguments, argv=argv)
    loaded, tokenizer = load_encoder(model_args)
    model: Any = loaded
    before = model.num_parameters(), len(tokenizer)
    counts = np.zeros(model.config.vocab_size, np.int64)
    output_dir = Path(args.output_dir).absolute()
    sources = read_sources(args.train_data, Columns((args.text_column,), None, "texts"))
    output_dir.mkdir(parents=True, exist_ok=True)
    for source in sources:
        counts += tokenize_documents(source, tokenizer).token_counts(len(counts)).numpy()
    of_prompts = np.zeros_like(counts)
    for prompt in model.config.prompts.values():
        of_prompts[tokenizer(prompt, add_special_tokens=False)["input_ids"]] = args.min_count
    keep = tokens_to_keep(tokenizer, counts + of_prompts, args.min_count)
    trimmed = trim_tokenizer(tokenizer, keep)
    trim_embeddings(model, keep)
    model.tokenizer = trimmed
    final = save(model, output_dir, title=output_dir.name, made=record((model_args, args)))
    print(
        f"{final}: {len(keep):,} of {before[1]:,} tokens, {model.num_parameters():,} of {before[0]:,} parameters; "
        f"{counts[keep].sum() / max(1, counts.sum()):.2%} of the tokens of the corpus are as they were"
    )


def _renumber(processor: dict[str, Any] | None, new_id: dict[int, int]) -> None:
    """Renumber the special tokens of a post-processor, in place."""
    if processor is None:
        return
    for inner in processor.get("processors", []):
        _renumber(inner, new_id)
    for name in ("sep", "cls"):  # post-processors of BERT and RoBERTa
        if name in processor:
            processor[name][1] = new_id[processor[name][1]]
    for token in (processor.get("special_tokens") or {}).values():
        token["ids"] = [new_id[number] for number in token["ids"]]


if __name__ == "__main__":
    run(main)
