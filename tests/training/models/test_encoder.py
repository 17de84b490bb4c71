"""The encoder that is trained reads what the encoder that is served reads."""

import json
import shutil

from tests.training.tiny_training import WORDS
from training.data.pairs.batches import PairTokenizer
from training.models.encoder import ModelArguments, load_encoder


def test_training_cuts_off_what_encode_cuts_off(tiny_longembed, tmp_path):
    """The end, also where a folder says `truncation_side: left`; a query keeps its prompt."""
    folder = tmp_path / "left"
    shutil.copytree(tiny_longembed, folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"truncation_side": "left"}))
    model, tokenizer = load_encoder(ModelArguments(str(folder)))
    context, text = model.config.max_position_embeddings, " ".join(WORDS * 60)
    read = PairTokenizer(tokenizer, context, context, model.config.prompts)([text], "query")
    assert [list(ids) for ids in read] == model.tokenize([text], model.config.prompts["query"])
    assert len(read[0]) == context
