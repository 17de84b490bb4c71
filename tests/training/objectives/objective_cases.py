"""Every objective with the options of its tests, and batches whose texts are random token ids."""

import torch

from modeling_longembed import LongEmbedModel
from tests.training.tiny_training import tiny_config, word_tokenizer
from training.data.packing import pack
from training.data.pairs.batches import PairBatch
from training.models.tuning import TuningArguments, select_parameters
from training.objectives.contrastive.arguments import ObjectiveArguments
from training.objectives.contrastive.corpus_words import CorpusWords
from training.objectives.contrastive.objective import Objective
from training.objectives.contrastive.registry import build_objective
from training.objectives.contrastive.words import BatchWords

# Options by case; a case is named after its objective. Queues are longer than a batch and no multiple of it.
CASES = {
    "info_nce": {"learnable_temperature": True, "symmetric": True, "negative_weight": -0.5},
    "info_nce masked": {"false_negative_margin": 0.02},
    "info_nce auxiliary": {"spread_out_weight": 0.5, "debias_weight": 2.0},
    "info_nce matryoshka": {"matryoshka_dims": [32, 8], "matryoshka_weights": [1.0, 0.5]},
    "info_nce maxsim": {
        "similarity": "maxsim",
        "symmetric": True,
        "learnable_temperature": True,
        "token_dims": [16, 8],
    },
    "info_nce meanmaxsim": {"similarity": "meanmaxsim", "token_pooling": 3, "false_negative_margin": 0.02},
    "info_nce auxiliary teaching": {
        "teach_vector_by": "meanmaxsim",
        "teach_weight": 0.5,
        "objective_weight": 0.25,
        "teach_temperature": 0.2,
        "teach_vector_temperature": 0.1,
    },
    "info_nce auxiliary bm25": {"teach_vector_by": "maxsim", "teach_bm25_weight": 0.3},
    "simcse": {"temperature": 0.1},
    "nt_xent": {"learnable_temperature": True, "head_dims": [16, 8]},
    "nt_xent matryoshka": {"matryoshka_dims": [32, 8]},
    "sup_con": {},
    "sup_con matryoshka": {"matryoshka_dims": [16, 8]},
    "vicreg": {"head_dims": [24, 16]},
    "momentum": {"queue_size": 15, "momentum": 0.8, "learnable_temperature": True},
    "momentum matryoshka": {"queue_size": 15, "momentum": 0.8, "matryoshka_dims": [32, 8]},
}
COLUMNS = {"simcse": 1, "nt_xent": 2, "vicreg": 2, "momentum": 2}  # columns of texts; 3 for info_nce and sup_con


def arguments_of(case: str) -> ObjectiveArguments:
    """The options of a case, as parsed."""
    return ObjectiveArguments(objective=case.split()[0], **CASES[case])


def double_encoder(dropout: float = 0.0) -> LongEmbedModel:
    """A tiny encoder with a token head and trained weights of query tokens, in float64, in training mode."""
    torch.manual_seed(1)
    encoder = LongEmbedModel(tiny_config(hidden_dropout_prob=dropout, token_dim=16, query_token_weights="state"))
    encoder.tokenizer = word_tokenizer()
    for parameter in encoder.token_output.query_gate.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # at zero the state has no influence
    return encoder.double().train()


def double_objective(case: str, encoder: torch.nn.Module, rows: int, options: dict | None = None) -> Objective:
    """The objective of a case in float64, in training mode; `options` replace those of the case."""
    torch.manual_seed(2)
    arguments = ObjectiveArguments(objective=case.split()[0], **(CASES[case] | (options or {})))
    wide_enough = max(rows, 2)
    select_parameters(encoder, TuningArguments(), token_output=arguments.by_tokens)
    if arguments.objective == "simcse":
        # The check of the dropout has its own test; here simcse is tested without dropout, too.
        rate, encoder.config.hidden_dropout_prob = encoder.config.hidden_dropout_prob, 0.1
        objective = build_objective(arguments, encoder, wide_enough)
        encoder.config.hidden_dropout_prob = rate
    else:
        objective = build_objective(arguments, encoder, wide_enough)
    return objective.double().train()


def words_of(case: str) -> BatchWords | None:
    """BM25 of the case, with documents of words that are named after the token ids of `batch_of`."""
    if not CASES[case].get("teach_bm25_weight"):
        return None
    corpus = CorpusWords()
    corpus.add([" ".join(f"word{number}" for number in range(5, stop)) for stop in range(6, 32)])
    return BatchWords(corpus)


def batch_of(case: str, pairs: int, budget: int, seed: int = 0, rows: slice = slice(None)) -> PairBatch:
    """Random texts of 1 to 40 tokens, one of them twice; `rows` are those of a process of a distributed run."""
    name = case.split()[0]
    count = COLUMNS.get(name, 3)
    generator = torch.Generator().manual_seed(seed)

    def text() -> list[int]:
        length = int(torch.randint(1, 41, (), generator=generator))
        return torch.randint(5, 31, (length,), generator=generator).tolist()

    columns = [[text() for _ in range(pairs)] for _ in range(count)]
    ids = 1000 * seed + torch.arange(count * pairs).view(count, pairs)
    if count > 1:
        columns[1][2], ids[1, 2] = columns[1][0], ids[1, 0]
    if name == "simcse":
        columns, ids = columns * 2, ids.repeat(2, 1)
    own = [column[rows] for column in columns]
    texts = [text for column in own for text in column]
    classes = {name: (torch.arange(pairs) % 3)[rows] for name in ("label", "group")}
    return PairBatch(
        pack(texts, budget),
        ids[:, rows].flatten(),
        len(own[0]),
        sum(map(len, texts)),
        (40,) * len(own),
        0,
        classes,
        [[" ".join(f"word{number}" for number in text) for text in column] for column in own],
    )


def gradients(*modules: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    """The accumulated gradients of each module by name, which are removed."""
    taken = []
    for module in modules:
        taken.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
        module.zero_grad()
    return taken


def state_of(objective: Objective) -> dict[str, torch.Tensor]:
    """Copies of the buffers."""
    return {name: buffer.clone() for name, buffer in objective.named_buffers()}
