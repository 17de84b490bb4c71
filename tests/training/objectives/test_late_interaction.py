"""Training by MaxSim against sentence-transformers' multi-vector losses, and the options of late interaction."""

import json
from functools import partial

import datasets
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sentence_transformers.multi_vector_encoder.losses import (
    CachedMultiVectorMultipleNegativesRankingLoss,
    MultiVectorDistillKLDivLoss,
    MultiVectorMarginMSELoss,
    MultiVectorMultipleNegativesRankingLoss,
)
from sentence_transformers.multi_vector_encoder.scoring import (
    mean_colbert_kd_scores,
    mean_colbert_scores,
    mean_colbert_scores_pairwise,
)
from sentence_transformers.util import maxsim, mean_maxsim
from sklearn.metrics import label_ranking_average_precision_score
from torch import nn

from common.errors import UserError
from modeling_longembed import LongEmbedModel
from modeling_longembed.output_token_pooling_longembed import pool_tokens
from tests.training.tiny_training import random_pairs, tiny_config, unit, write_jsonl
from training import contrastive, distillation
from training.data.pairs.batches import PairTokenizer, collate_pairs
from training.data.sources import Source
from training.engine.checkpoints.folders import WEIGHTS
from training.objectives.contrastive.arguments import ObjectiveArguments
from training.objectives.contrastive.registry import build_objective
from training.objectives.embed import embed_for_scoring
from training.objectives.losses.token_vectors import for_scoring
from training.objectives.pair_retrieval import PairRetrieval
from training.objectives.pair_step import pair_gradient
from training.teachers.arguments import TeachingArguments
from training.teachers.objective import Teaching
from training.teachers.step import teaching_gradient

PAIRS, NEGATIVES = 5, 2


@pytest.fixture
def model(word_tokenizer) -> LongEmbedModel:
    """A tiny model in float64 with a token head and weights of query tokens, which are not 1."""
    torch.manual_seed(1)
    model = LongEmbedModel(tiny_config(token_dim=16, query_token_weights="state"))
    model.tokenizer = word_tokenizer
    with torch.no_grad():
        model.token_output.query_table.uniform_(0.5, 3.0)
        model.token_output.query_gate.weight.normal_()
    return model.double().train()


@pytest.fixture(scope="module")
def token_folder(tmp_path_factory, word_tokenizer):
    """A saved tiny model with a token head and weights of query tokens."""
    folder = tmp_path_factory.mktemp("tokens")
    torch.manual_seed(0)
    LongEmbedModel(tiny_config(token_dim=16, query_token_weights="state")).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


class Padded(nn.Module):
    """A model as sentence-transformers' losses call it: padded batches, each of one kind of texts."""

    def __init__(self, model: LongEmbedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: dict, task: str) -> dict[str, torch.Tensor]:
        output = self.model(features["input_ids"], features["attention_mask"], token_vectors=task)
        return {"token_embeddings": output.token_vectors, "attention_mask": output.token_mask}


def columns_of(rows: list[dict[str, str]]) -> list[list[str]]:
    names = ("anchor", "positive", *(f"negative_{n}" for n in range(NEGATIVES)))
    return [[row[name] for row in rows] for name in names]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    taken = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return taken


def teaching(loss: str, similarity: str, model: LongEmbedModel):
    """The gradient of distillation, with the scores of `SCORES` as the teacher's."""
    arguments = TeachingArguments(
        score_column="scores", score_loss=loss, similarity=similarity, score_scale=1.0, score_temperature=0.5
    )

    class Scores:
        def read(self, batch):
            return SCORES, torch.ones(PAIRS, dtype=torch.bool)

    return teaching_gradient(Teaching(arguments, model, {"score": 1 + NEGATIVES}), {"score": Scores()})


def contrast(similarity: str, model: LongEmbedModel):
    arguments = ObjectiveArguments(similarity=similarity, temperature=0.5)
    return pair_gradient(build_objective(arguments, model, PAIRS))


SCORES = torch.randn(PAIRS, 1 + NEGATIVES, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
THEIRS = {  # our gradient, their loss, and its targets
    "in-batch negatives": (
        partial(contrast, "maxsim"),
        lambda model: MultiVectorMultipleNegativesRankingLoss(model, scale=2.0),
        None,
    ),
    "in-batch negatives, cached": (
        partial(contrast, "maxsim"),
        lambda model: CachedMultiVectorMultipleNegativesRankingLoss(model, scale=2.0, mini_batch_size=2),
        None,
    ),
    "in-batch negatives, mean": (
        partial(contrast, "meanmaxsim"),
        lambda model: MultiVectorMultipleNegativesRankingLoss(model, scale=2.0, similarity_fct=mean_colbert_scores),
        None,
    ),
    "KL": (
        partial(teaching, "kl", "maxsim"),
        lambda model: MultiVectorDistillKLDivLoss(model, temperature=0.5),
        SCORES,
    ),
    "KL, mean": (
        partial(teaching, "kl", "meanmaxsim"),
        lambda model: MultiVectorDistillKLDivLoss(model, temperature=0.5, similarity_fct=mean_colbert_kd_scores),
        SCORES,
    ),
    "margins": (partial(teaching, "margin_mse", "maxsim"), MultiVectorMarginMSELoss, SCORES),
    "margins, mean": (
        partial(teaching, "margin_mse", "meanmaxsim"),
        lambda model: MultiVectorMarginMSELoss(model, similarity_fct=mean_colbert_scores_pairwise),
        SCORES,
    ),
}


@pytest.mark.parametrize("case", THEIRS)
def test_loss_and_gradients_are_those_of_sentence_transformers(case, model, word_tokenizer, monkeypatch):
    """Theirs over padded batches, ours over packed chunks in which queries and documents mix."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # in which they add up scores
    ours, theirs, targets = THEIRS[case]
    columns = columns_of(random_pairs(PAIRS, negatives=NEGATIVES))
    features = [dict(word_tokenizer(texts, padding=True, return_tensors="pt")) for texts in columns]
    value = theirs(Padded(model))(features, targets)
    value.backward()
    expected = gradients(model)
    assert expected["token_output.query_gate.weight"].abs().max() > 1e-3
    for budget in (50, 10**6):
        batch = collate_pairs(columns, PairTokenizer(word_tokenizer, 128, 128, {}), budget)
        metrics = ours(model)(model, batch, 1.0, True)
        torch.testing.assert_close(metrics["loss"], value.detach().double(), atol=1e-12, rtol=0)
        torch.testing.assert_close(gradients(model), expected, atol=1e-12, rtol=0)


def test_held_out_pairs_are_ranked_by_maxsim(model, word_tokenizer):
    """The reciprocal rank is scikit-learn's of sentence-transformers' scores; the loss is a cross entropy of them."""
    model.eval()
    rows = random_pairs(12, seed=3)
    texts = {name: [row[name] for row in rows] for name in ("anchor", "positive")}
    source = Source("held-out", datasets.Dataset.from_dict(texts), ("anchor", "positive"))
    retrieval = PairRetrieval(source, PairTokenizer(word_tokenizer, 64, 64, {}), batch_size=12, batch_tokens=40)
    for similarity, scores_of in (("maxsim", maxsim), ("meanmaxsim", mean_maxsim)):
        arguments = ObjectiveArguments(similarity=similarity)
        metrics = retrieval(lambda chunk, kind, a=arguments: embed_for_scoring(model, chunk, kind, a), 0.5)
        vectors = []
        for side, column in (("query", texts["anchor"]), ("document", texts["positive"])):
            output = model(**word_tokenizer(column, padding=True, return_tensors="pt"), token_vectors=side)
            vectors.append([row[kept] for row, kept in zip(output.token_vectors, output.token_mask, strict=True)])
        scores = scores_of(*vectors).detach()
        assert metrics["eval_mrr"] == pytest.approx(label_ranking_average_precision_score(torch.eye(12), scores))
        assert metrics["eval_loss"] == pytest.approx(F.cross_entropy(scores / 0.5, torch.arange(12)).item(), rel=1e-4)
        assert "eval_alignment" not in metrics


def test_pooled_documents_are_those_that_are_kept():
    """Queries stay as they are. A vector of a document is the one that `encode` would keep, with a gradient to all."""
    count = torch.tensor([3, 0, 9, 1, 12])
    vectors = unit(int(count.sum()), 8).requires_grad_()
    texts = for_scoring(vectors, count, 2, mean=False, pooling=3)
    torch.testing.assert_close(texts.vectors[:3], vectors[:3], atol=0, rtol=0)
    for number, document in ((2, vectors[3:12]), (3, vectors[12:13]), (4, vectors[13:])):
        torch.testing.assert_close(texts[[number]].packed()[0], pool_tokens(document.detach(), 3)[0])
    assert texts.count[2] < 9
    (gradient,) = torch.autograd.grad(texts.vectors.sum(), vectors)
    assert gradient[3:].abs().amax(1).min() > 0
    assert gradient[:3].eq(1).all()


def test_a_training_moves_head_and_weights_and_lowers_the_loss(token_folder, pairs_file, tmp_path):
    """Weights of query tokens have a learning rate of their own, and what is resumed goes on."""
    options = f"--model_name_or_path {token_folder} --train_data {pairs_file} --eval_split 0.2 --eval_steps 10 "
    options += "--similarity maxsim --token_dims 16 8 --token_pooling 2 --token_weights_learning_rate 0.05 "
    options += "--per_device_train_batch_size 8 --batch_tokens 200 --learning_rate 3e-3 --logging_steps 1 "
    options += f"--dataloader_num_workers 0 --report_to none --save_steps 10 --output_dir {tmp_path} "
    contrastive.main((options + "--max_steps 20").split())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert {"loss_at_16", "loss_at_8"} <= lines[0].keys()
    assert [line["eval_mrr"] > 0 for line in lines if "eval_mrr" in line] == [True, True]
    before, after = (LongEmbedModel.from_pretrained(folder) for folder in (token_folder, tmp_path / "final"))
    moved = {
        name: (after.get_parameter(name) - parameter).abs().max().item()
        for name, parameter in before.token_output.named_parameters(prefix="token_output")
    }
    assert 0 < moved["token_output.head.weight"] < 0.06 < moved["token_output.query_table"]
    assert moved["token_output.query_gate.weight"] > 0.06
    with pytest.raises(UserError, match=r"--similarity maxsim, now it is meanmaxsim.*a training starts from it"):
        contrastive.main((options + "--similarity meanmaxsim --max_steps 20 --resume_from_checkpoint last").split())


def test_a_resumed_run_gives_the_weights_of_query_tokens_another_rate(token_folder, pairs_file, tmp_path):
    """One that has none at first; AdamW's step is about its learning rate, and without decay nothing else moves them.

    The optimiser's groups are those of the checkpoint, whatever the rates are.
    """
    options = f"--model_name_or_path {token_folder} --train_data {pairs_file} --similarity maxsim --dropout 0 "
    options += "--per_device_train_batch_size 8 --batch_tokens 200 --learning_rate 1e-4 --lr_scheduler_type constant "
    options += "--weight_decay 1000 --save_total_limit 9 "
    options += f"--dataloader_num_workers 0 --report_to none --output_dir {tmp_path} "
    contrastive.main((options + "--max_steps 1").split())
    more = "--resume_from_checkpoint last --change_settings max_steps token_weights_learning_rate "
    contrastive.main((options + "--max_steps 2 " + more).split())
    contrastive.main((options + "--max_steps 3 --token_weights_learning_rate 0.05 " + more).split())
    folders = [tmp_path / "checkpoints" / f"step-{step}" / WEIGHTS for step in (1, 2, 3)]
    one, two, three = (load_file(folder) for folder in folders)
    for name in ("token_output.query_table", "token_output.query_gate.weight"):
        assert 5e-5 < (two[name] - one[name]).abs().max() < 2e-4
        assert 0.02 < (three[name] - two[name]).abs().max() < 0.1


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_run_says_that_head_and_weights_do_not_train(token_folder, pairs_file, tmp_path, capsys, tuning):
    options = f"--model_name_or_path {token_folder} --train_data {pairs_file} --similarity maxsim --max_steps 1 "
    options += f"--per_device_train_batch_size 8 --dataloader_num_workers 0 --report_to none --output_dir {tmp_path} "
    contrastive.main((options + f"--tuning {tuning}").split())
    said = "the token head and the weights of query tokens stay as they are: only --tuning full trains them"
    assert (said in capsys.readouterr().err) == (tuning == "lora")


def test_without_late_interaction_the_token_output_stays(token_folder, pairs_file, tmp_path):
    """What no loss reads does not train, and has no place in the optimiser."""
    options = f"--model_name_or_path {token_folder} --train_data {pairs_file} --per_device_train_batch_size 8 "
    options += f"--dataloader_num_workers 0 --report_to none --max_steps 1 --output_dir {tmp_path}"
    contrastive.main(options.split())
    before, after = (LongEmbedModel.from_pretrained(folder) for folder in (token_folder, tmp_path / "final"))
    torch.testing.assert_close(dict(after.token_output.state_dict()), dict(before.token_output.state_dict()))


def test_late_interaction_teaches_the_one_vector_and_learns_nothing_itself(token_folder, pairs_file, tmp_path):
    """From the scores of the token vectors alone, at a weight of 0 of the pairs; token head and weights stay."""
    options = f"--model_name_or_path {token_folder} --train_data {pairs_file} --per_device_train_batch_size 16 "
    options += "--teach_vector_by maxsim --objective_weight 0 --teach_vector_temperature 0.2 --dropout 0 "
    options += "--learning_rate 3e-3 --logging_steps 1 --batch_tokens 400 --max_steps 12 "
    options += f"--dataloader_num_workers 0 --report_to none --output_dir {tmp_path}"
    contrastive.main(options.split())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    taught = [line["teach"] for line in lines if "teach" in line]
    assert sum(taught[-3:]) < 0.9 * sum(taught[:3])
    before, after = (LongEmbedModel.from_pretrained(folder) for folder in (token_folder, tmp_path / "final"))
    torch.testing.assert_close(dict(after.token_output.state_dict()), dict(before.token_output.state_dict()))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        *[
            (f"--objective {name}", f"--similarity: applies only with --objective info_nce or simcse.* is {name}")
            for name in ("nt_xent", "sup_con", "vicreg", "momentum")
        ],
        *[
            (f"--{name} {value}", f"--{name}: applies only with another --similarity than maxsim or meanmaxsim")
            for name, value in (("matryoshka_dims", 8), ("spread_out_weight", 0.1), ("debias_weight", 0.1))
        ],
        ("--token_dims 16 17", "--token_dims 17: must be from 1 to 16, the size of the token vectors"),
        ("--token_dims 0", "--token_dims 0: must be from 1 to 16"),
        ("--token_pooling 0", "--token_pooling/--token-pooling: 0: must be at least 1 and at most 32"),
        ("--similarity cosine --token_dims 8", "--token_dims: applies only with --similarity maxsim or meanmaxsim"),
        ("--similarity cosine --token_pooling 2", "--token_pooling: applies only with --similarity maxsim"),
        (
            "--teach_vector_by meanmaxsim",
            "--teach_vector_by meanmaxsim: the model learns to score by maxsim; give that",
        ),
        ("--teach_weight 0.5", "--teach_weight: applies only with --teach_vector_by"),
        ("--token_weights_learning_rate 0.1 --tuning lora", "no weights of query tokens train"),
    ],
)
def test_what_cannot_be_combined_is_refused_by_name(options, complaint, token_folder, pairs_file, tmp_path):
    given = f"--model_name_or_path {token_folder} --train_data {pairs_file} --output_dir {tmp_path}/out "
    given += f"--max_steps 1 --per_device_train_batch_size 8 --dataloader_num_workers 0 --similarity maxsim {options}"
    with pytest.raises(UserError, match=complaint) as caught:
        contrastive.main(given.split())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_without_a_head_the_states_are_compared_and_have_no_sizes(model_folder, pairs_file, tmp_path):
    options = f"--model_name_or_path {model_folder} --train_data {pairs_file} --per_device_train_batch_size 8 "
    options += f"--dataloader_num_workers 0 --report_to none --max_steps 1 --output_dir {tmp_path} --similarity maxsim "
    with pytest.raises(UserError, match=r"no token head.*fit one with training/token_output.py --token_dim"):
        contrastive.main((options + "--token_dims 8").split())
    contrastive.main(options.split())
    assert (tmp_path / "final").is_dir()


def test_scores_are_learned_by_maxsim(token_folder, tmp_path):
    rows = [row | {"scores": [2.0, 0.0]} for row in random_pairs(16, negatives=1)]
    options = f"--model_name_or_path {token_folder} --train_data {write_jsonl(tmp_path / 'rows.jsonl', rows)} "
    options += f"--text_columns anchor positive negative_0 --score_column scores --output_dir {tmp_path}/out "
    options += "--eval_data " + str(tmp_path / "rows.jsonl") + " --eval_steps 1 --similarity maxsim --token_dims 16 8 "
    options += "--per_device_train_batch_size 8 --dataloader_num_workers 0 --report_to none --max_steps 1 "
    options += "--token_weights_learning_rate 0.05"
    distillation.main(options.split())
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval_score_loss"] > 0 for line in lines if "eval_loss" in line] == [True]
    with pytest.raises(UserError, match="only with --score_teacher, or with --score_column"):
        distillation.main(f"{options} --structural_teacher t".replace("--score_column scores", "").split())
