"""The objective of students: exact over chunks and processes, masks, translations, heads, and refused options."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.nn.parallel import DistributedDataParallel

from common.arguments import parse
from common.errors import UserError
from modeling_longembed import LongEmbedModel
from tests.fresh_processes import with_fresh_processes
from tests.training.tiny_training import random_documents, tiny_config, word_tokenizer, write_jsonl
from tests.two_processes import PROCESSES, in_two_processes
from training import distillation, pretraining
from training.data.packing import pack
from training.data.pairs.batches import PairBatch, PairTokenizer
from training.data.sources import Source
from training.models.tuning import TuningArguments, select_parameters
from training.objectives.losses.correlation import SoftCCA, dcca
from training.objectives.losses.soft_targets import margin_mse, soft_targets
from training.teachers.arguments import TeachingArguments
from training.teachers.objective import Teaching
from training.teachers.step import TeachingEvaluation, teaching_gradient

ROWS, WIDTH = 12, 6
CASES = {
    "mse": {"structural_loss": "mse"},
    "masked max-margin": {"structural_loss": "max_margin_mse", "structural_mask": True},
    "cosine behind a head": {"structural_loss": "cosine", "structural_head_dims": [16, 8]},
    "soft cca": {"contextual_loss": "soft_cca", "contextual_width": 5, "contextual_teacher_head_dims": [7]},
    "dcca": {"contextual_loss": "dcca", "contextual_width": 4, "contextual_weight": 0.3},
    "scores": {"score_loss": "kl", "score_scale": 5.0, "score_temperature": 2.0},
    "scores by tokens": {
        "score_loss": "margin_mse",
        "score_scale": 0.5,
        "similarity": "maxsim",
        "token_dims": [16, 8],
        "token_pooling": 2,
    },
    "late chunks": {
        "structural_loss": "cosine",
        "structural_mask": True,
        "late_chunk_tokens": 7,
        "late_chunk_weight": 0.4,
        "structural_head_dims": [9],
    },
    "both": {"structural_mask": True, "contextual_loss": "mse", "structural_weight": 0.2, "normalize_student": False},
}


def arguments_of(case: str, **more) -> TeachingArguments:
    options = CASES[case] | more
    roles = ["structural", "contextual"] if case == "both" else [next(iter(options)).split("_")[0]]
    return TeachingArguments(**{f"{role}_teacher": "a teacher" for role in roles}, **options)


def encoder(dropout: float = 0.0) -> LongEmbedModel:
    torch.manual_seed(1)
    model = LongEmbedModel(tiny_config(hidden_dropout_prob=dropout, token_dim=16, query_token_weights="table"))
    model.tokenizer = word_tokenizer()
    return model.double().train()


def objective_of(case: str, model: torch.nn.Module, **more) -> Teaching:
    torch.manual_seed(2)
    arguments = arguments_of(case, **more)
    select_parameters(model, TuningArguments(), token_output=arguments.by_tokens)
    roles = [role for role in ("structural", "contextual", "score") if getattr(arguments, f"{role}_teacher")]
    return Teaching(arguments, model, dict.fromkeys(roles, WIDTH)).double().train()


class FixedTeacher:
    """A teacher with fixed random vectors or scores; a text is its number, and a chunk that of its text and its own."""

    def __init__(self, role: str) -> None:
        self.role = role

    def read(self, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        if self.role == "chunk":
            return fixed_vectors([int(text) for chunks in batch.chunk_texts for text in chunks if text])
        vectors, inside = fixed_vectors([int(text) for text in batch.texts[0]])
        return (5 * vectors[:, : len(batch.texts) - 1] if self.role == "score" else vectors), inside


def fixed_vectors(numbers: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(10 * ROWS, WIDTH, generator=generator, dtype=torch.float64), dim=-1)
    return rows[numbers], torch.tensor(numbers) % 3 > 0


def fixed_teachers(objective: Teaching) -> dict[str, FixedTeacher]:
    more = [] if objective.arguments.late_chunk_tokens is None else ["chunk"]
    return {role: FixedTeacher(role) for role in [*objective.parts, *more]}


def batch_of(columns: int, budget: int, rows: slice = slice(None)) -> PairBatch:
    """Random texts of 1 to 40 tokens; those of the first column are named by their number.

    Every fifth of the chunks of 7 tokens has no text, whatever its tokens are.
    """
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 41, (columns, ROWS), generator=generator)
    ids = [[torch.randint(5, 31, (int(n),), generator=generator).tolist() for n in column] for column in lengths]
    own = [column[rows] for column in ids]
    names = [str(number) for number in range(ROWS)][rows]
    texts = [text for column in own for text in column]
    text_ids = torch.arange(len(texts))
    chunks = [
        [str(10 * int(name) + place) if (int(name) + place) % 5 else "" for place in range(-(-len(text) // 7))]
        for name, text in zip(names, own[0], strict=True)
    ]
    return PairBatch(
        pack(texts, budget),
        text_ids,
        len(names),
        sum(map(len, texts)),
        (40,) * columns,
        0,
        texts=[names] * columns,
        chunk_texts=chunks,
    )


def gradients(*modules: torch.nn.Module) -> list[dict[str, torch.Tensor]]:
    taken = [{name: p.grad for name, p in module.named_parameters() if p.grad is not None} for module in modules]
    for module in modules:
        module.zero_grad()
    return taken


def computed(case: str, columns: int, budget: int, dropout: float = 0.0) -> tuple[list, dict[str, torch.Tensor]]:
    model = encoder(dropout)
    objective = objective_of(case, model)
    torch.manual_seed(4)
    metrics = teaching_gradient(objective, fixed_teachers(objective))(model, batch_of(columns, budget), 1.0, True)
    return gradients(model, objective), metrics


@pytest.mark.promise("C8")
@pytest.mark.parametrize(("case", "columns"), [(c, n) for c in CASES for n in (1, 3) if n > 1 or "scores" not in c])
def test_chunks_give_the_gradient_of_the_whole_batch(case, columns):
    """This includes DCCA and soft CCA, whose loss is over all rows of a batch that is never in memory at once."""
    whole, measured = computed(case, columns, 10**6)
    for budget in (1, 100):
        chunked, metrics = computed(case, columns, budget)
        torch.testing.assert_close(chunked, whole, atol=1e-10, rtol=0)
        torch.testing.assert_close(metrics["loss"], measured["loss"], atol=1e-10, rtol=0)
    assert max(gradient.abs().max() for gradient in whole[0].values()) > 1e-6


def of_one_process(rank: int) -> dict:
    share, results = ROWS // PROCESSES, {}
    for case in CASES:
        model = encoder()
        objective = objective_of(case, model)
        wrapped = DistributedDataParallel(model)
        rows = slice(rank * share, (rank + 1) * share)
        gradient = teaching_gradient(objective, fixed_teachers(objective))
        gradient(wrapped, batch_of(3, 100 - 40 * rank, rows), 1.0, True)
        results[case] = gradients(model, objective)
    return results


@with_fresh_processes
@pytest.mark.promise("C9")
def test_two_processes_have_the_gradient_of_one(tmp_path):
    both = in_two_processes(of_one_process, tmp_path)
    for case in CASES:
        whole, _ = computed(case, 3, 100)
        torch.testing.assert_close(both[0][case][0], whole[0], atol=1e-10, rtol=0)  # DDP has taken the mean
        mean = {name: (both[0][case][1][name] + both[1][case][1][name]) / 2 for name in whole[1]}
        torch.testing.assert_close(mean, whole[1], atol=1e-10, rtol=0)  # the loop takes it


def random_targets() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student = torch.randn(ROWS, 1, 32, dtype=torch.float64)
    return student, *fixed_vectors(list(range(ROWS)))


@pytest.mark.parametrize("case", ["masked max-margin", "both"])
def test_a_masked_text_gets_nothing_from_the_structural_teacher_and_gives_nothing(case):
    """The loss is that of the other texts alone: a masked text is not a negative, either."""
    student, vectors, inside = random_targets()
    objective = objective_of(case, encoder(), contextual_weight=0.0)
    student.requires_grad_()
    targets = dict.fromkeys(objective.parts, (vectors, inside))
    loss, metrics = objective(student, targets)
    loss.backward()
    assert student.grad[~inside].abs().max() == 0 < student.grad[inside].abs().max()
    alone = dict.fromkeys(objective.parts, (vectors[inside], inside[inside]))
    torch.testing.assert_close(objective(student[inside], alone)[0], loss, atol=1e-12, rtol=0)
    assert metrics["structural_share"].item() == pytest.approx(inside.double().mean().item())


def test_a_batch_of_masked_texts_alone_is_no_mistake():
    student, vectors, inside = random_targets()
    objective = objective_of("masked max-margin", encoder())
    some, _ = objective(student, {"structural": (vectors, inside)}), None
    none = objective(student.requires_grad_(), {"structural": (vectors, inside & False)})
    assert none[0].item() == 0
    none[0].backward()
    assert student.grad.abs().max() == 0
    assert some[1].keys() == none[1].keys()


@pytest.mark.promise("D8")
def test_the_loss_of_chunks_is_that_of_each_chunk_against_its_vector():
    """Chunk by chunk of text by text, from one padded pass a text; chunks without text or beyond the window are out.

    The head is that of whole texts, and the further columns have no chunks.
    """
    model, distances = encoder(), []
    objective = objective_of("late chunks", model)
    batch = batch_of(2, 10**6)
    for number, chunks in enumerate(batch.chunk_texts):
        start, stop = batch.chunks[0].cu_seq_lens_q[number : number + 2].tolist()
        states = model(batch.chunks[0].input_ids[:, start:stop]).last_hidden_state[0]
        for place, name in enumerate(chunks):
            if not name or int(name) % 3 == 0:  # beyond the window
                continue
            mine = objective.parts["structural"].head(states[7 * place : 7 * place + 7].mean(0))
            distances.append(1 - F.cosine_similarity(mine, fixed_vectors([int(name)])[0][0], dim=0))
    assert 10 < len(distances) < sum(map(len, batch.chunk_texts)) / 1.5
    _, metrics = computed("late chunks", 2, 100)
    torch.testing.assert_close(metrics["chunk_loss"], torch.stack(distances).mean().detach(), atol=1e-12, rtol=0)
    expected = metrics["structural_loss"] + 0.4 * metrics["chunk_loss"]
    torch.testing.assert_close(metrics["loss"], expected, atol=1e-12, rtol=0)


@pytest.mark.promise("D3")
def test_a_student_with_the_teachers_vectors_has_no_loss_and_no_gradient():
    model = LongEmbedModel(tiny_config())
    _, _, inside = random_targets()
    vectors = F.normalize(torch.randn(ROWS, 32, dtype=torch.float64), dim=-1)
    for loss in ("mse", "cosine"):
        arguments = arguments_of("mse", structural_loss=loss, late_chunk_tokens=7)
        objective = Teaching(arguments, model, {"structural": 32, "chunk": 32})
        assert not list(objective.parameters())  # equal widths: no projection
        student, chunks = (3 * vectors[:, None]).requires_grad_(), (2 * vectors[:5]).requires_grad_()
        targets = {"structural": (vectors, inside), "chunk": (vectors[:5], inside[:5])}
        value, _ = objective(student, targets, chunks)
        value.backward()
        assert value.item() == pytest.approx(0, abs=1e-12)
        assert max(student.grad.abs().max(), chunks.grad.abs().max()) < 1e-12
        assert objective(student, targets, chunks.flip(0))[0] > 1e-3


def test_translations_learn_the_vector_of_the_first_column():
    student, vectors, inside = random_targets()
    columns = torch.cat([student, torch.randn_like(student)], dim=1)
    objective = objective_of("mse", encoder())
    targets = {"structural": (vectors, inside)}
    apart = [objective(column[:, None], targets)[0] for column in columns.unbind(1)]
    torch.testing.assert_close(objective(columns, targets)[0], torch.stack(apart).mean(), atol=1e-12, rtol=0)


def unit(vectors: torch.Tensor) -> torch.Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def margins(student: torch.Tensor, teacher: torch.Tensor, gamma: float) -> torch.Tensor:
    """Max-margin MSE row by row."""
    rows = []
    for i, row in enumerate(student):
        others = [(row - other).square().mean() for j, other in enumerate(teacher) if j != i]
        rows.append((row - teacher[i]).square().mean() - gamma * sum(others) / len(others))
    return sum(rows) / len(rows)


def soft_cca(student: torch.Tensor, teacher: torch.Tensor, momentum: float, weight: float) -> torch.Tensor:
    """The loss of a second batch, after a first one in which both views were the teacher's."""
    loss = SoftCCA(4, momentum=momentum, sdl_weight=weight).double()
    loss(teacher, teacher)
    return loss(student, teacher)[0]


def candidates(rows: torch.Tensor) -> torch.Tensor:
    return torch.stack([F.cosine_similarity(rows[:, 0], rows[:, n]) for n in range(1, rows.shape[1])], dim=1)


AS_LONG = {"normalize_student": False}
OPTIONS = [  # command-line options, and the loss of student y and teacher t with them
    ({"structural_loss": "mse", "structural_weight": 0.3}, lambda y, t: 0.3 * F.mse_loss(unit(y), t)),
    ({"structural_loss": "mse"} | AS_LONG, lambda y, t: F.mse_loss(y, t)),
    ({"structural_loss": "cosine"}, lambda y, t: 1 - F.cosine_similarity(y, t).mean()),
    ({"structural_loss": "max_margin_mse", "structural_gamma": 1.4}, lambda y, t: margins(unit(y), t, 1.4)),
    ({"structural_loss": "max_margin_mse", "structural_gamma": 0.4} | AS_LONG, lambda y, t: margins(y, t, 0.4)),
    ({"contextual_loss": "mse", "contextual_weight": 0.3}, lambda y, t: 0.3 * F.mse_loss(unit(y), t)),
    ({"contextual_loss": "mse"} | AS_LONG, lambda y, t: F.mse_loss(y, t)),
    (
        {"contextual_loss": "soft_cca", "contextual_weight": 2.0, "sdl_weight": 0.5, "sdl_momentum": 0.3},
        lambda y, t: 2 * soft_cca(y, t, 0.3, 0.5),
    ),
    ({"score_loss": "kl", "score_weight": 0.3}, lambda y, t: 0.3 * soft_targets(20 * candidates(y), t)[0]),
    (
        {"score_loss": "kl", "score_scale": 3.0, "score_temperature": 2.0},
        lambda y, t: soft_targets(3 * candidates(y), t, temperature=2.0)[0],
    ),
    ({"score_loss": "margin_mse", "score_scale": 3.0}, lambda y, t: margin_mse(3 * candidates(y), t)[0]),
]


@pytest.mark.parametrize(("options", "expected"), OPTIONS, ids=[str(number) for number in range(len(OPTIONS))])
def test_options_reach_the_loss(options, expected):
    """Test the wiring of options; where the expected value calls a production loss, its formula has other tests."""
    role = next(iter(options)).split("_")[0]
    arguments = TeachingArguments(**{f"{role}_teacher": "a teacher"}, **options)
    model = LongEmbedModel(tiny_config(hidden_size=4, num_attention_heads=2))
    objective = Teaching(arguments, model, {role: 4}).double()
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(ROWS, 5 if role == "score" else 1, 4, generator=generator, dtype=torch.float64)
    teacher = unit(torch.randn(ROWS, 4, generator=generator, dtype=torch.float64))
    targets = {role: (teacher, torch.ones(ROWS, dtype=torch.bool))}
    if options.get("contextual_loss") == "soft_cca":
        objective(teacher[:, None], targets)
    loss, _ = objective(student, targets)
    torch.testing.assert_close(loss, expected(student if role == "score" else student[:, 0], teacher))


def test_the_evaluation_is_the_mean_over_batches(model_folder, word_tokenizer):
    """7 rows are divided into batches of 3, 2 and 2. The expected vectors come from the model's `encode`."""
    texts = [row["text"] for row in random_documents(7)]
    model = LongEmbedModel.from_pretrained(model_folder).eval()
    vectors = unit(torch.randn(7, 32, generator=torch.Generator().manual_seed(0)))

    class ByText:
        def read(self, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
            found = vectors[[texts.index(text) for text in batch.texts[0]]]
            return found, torch.ones(len(found), dtype=torch.bool)

    evaluation = TeachingEvaluation(
        Source("rows", Dataset.from_dict({"text": texts}), ("text",), anchor_kind="document"),
        PairTokenizer(word_tokenizer, 128, 128, {}),
        Teaching(TeachingArguments(structural_teacher="a teacher"), model, {"structural": 32}),
        {"structural": ByText()},
        batch_size=2,
        batch_tokens=100,
    )
    own = model.encode(texts, output="torch", precision="float32")
    expected = [F.mse_loss(own[rows], vectors[rows]).item() for rows in (slice(0, 3), slice(3, 5), slice(5, 7))]
    found = evaluation(model, torch.device("cpu"))
    assert found["eval_loss"] == pytest.approx(sum(expected) / 3, rel=1e-4)


@pytest.mark.promise("D7")
def test_dcca_does_not_see_the_scale_of_a_dimension():
    student, vectors, inside = random_targets()
    model = LongEmbedModel(tiny_config(hidden_size=4, num_attention_heads=2))
    objective = Teaching(arguments_of("dcca", contextual_width=None), model, {"contextual": WIDTH}).double()
    student = student[:, :, :4]
    loss, _ = objective(student, {"contextual": (vectors, inside)})
    scaled, _ = objective(
        student * torch.logspace(-1, 3, 4, dtype=torch.float64), {"contextual": (9 * vectors, inside)}
    )
    torch.testing.assert_close(scaled, loss, atol=1e-3, rtol=0)
    unregularised, _ = dcca(student[:, 0], vectors, regularization=0.0)
    torch.testing.assert_close(loss / 0.3, unregularised, atol=0.1, rtol=0)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "no teacher: give --structural_teacher"),
        ({"contextual_loss": "mse", "contextual_width": 4}, "would learn to give one vector for all"),
        ({"structural_loss": "max_margin_mse", "normalize_student": False}, "without unit length .* has no minimum"),
    ],
)
def test_invalid_options_are_refused(options, complaint):
    teacher = {"structural_teacher": "a teacher"} if options else {}
    with pytest.raises(UserError, match=complaint):
        TeachingArguments(**teacher, **options)


WEIGHTS = ("structural_weight", "late_chunk_weight", "contextual_weight", "score_weight", "sdl_weight")


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        *[(name, -1, "must be at least 0") for name in (*WEIGHTS, "structural_gamma", "dcca_regularization")],
        *[(name, "nan", "nan is no finite number") for name in (*WEIGHTS, "structural_gamma", "score_scale")],
        ("score_scale", "inf", "inf is no finite number"),
        *[(name, 0, "must be more than 0") for name in ("score_scale", "score_temperature")],
        *[
            (f"{name}_head_dims", 0, "must be at least 1")
            for name in ("structural", "contextual", "contextual_teacher")
        ],
        *[(name, 0, "must be at least 1") for name in ("contextual_width", "dcca_components", "late_chunk_tokens")],
        ("sdl_momentum", 1.5, "must be at least 0 and at most 1"),
    ],
)
def test_a_number_out_of_range_is_refused(option, value, complaint):
    with pytest.raises(UserError, match=f"--{option}.*: {complaint}"):
        parse(TeachingArguments, argv=["--structural_teacher", "a teacher", f"--{option}={value}"])


@pytest.mark.parametrize(
    ("loss", "fewest"), [("--contextual_loss dcca --contextual_width 8", 9), ("--contextual_loss soft_cca", 2)]
)
def test_too_few_rows_for_the_loss_are_refused_before_the_teacher_reads(model_folder, tmp_path, loss, fewest):
    """The smallest number of rows is enough, in training and in evaluation."""
    rows = random_documents(20)
    held_out = {count: write_jsonl(tmp_path / f"{count}.jsonl", rows[:count]) for count in (fewest - 1, fewest)}
    options = f"--model_name_or_path {model_folder} --contextual_teacher truncate:{model_folder}:24 {loss} "
    options += f"--train_data {write_jsonl(tmp_path / 'rows.jsonl', rows)} --output_dir {tmp_path}/out "
    options += "--max_steps 1 --dataloader_num_workers 0 "
    for few, complaint in (
        (f"--per_device_train_batch_size {fewest - 1}", f"--per_device_train_batch_size: {fewest - 1} rows at once"),
        (
            f"--per_device_train_batch_size {fewest} --eval_data {held_out[fewest]} {held_out[fewest - 1]}",
            f"--eval_data {held_out[fewest - 1]}: {fewest - 1} rows at once.* at least {fewest} ",
        ),
    ):
        with pytest.raises(UserError, match=complaint):
            distillation.main((options + few).split())
        assert not (tmp_path / "out" / "teachers.sqlite").exists()
    distillation.main(f"{options} --per_device_train_batch_size {fewest} --eval_data {held_out[fewest]}".split())
    assert (tmp_path / "out" / "final").is_dir()


RECIPES = Path(distillation.__file__).parent / "recipes" / "distillation"


@pytest.mark.parametrize("recipe", ["distilbert", *sorted(path.stem for path in RECIPES.glob("*.yaml"))])
def test_recipes_train(model_folder, masked_lm_folder, tmp_path, recipe):
    """Options that are too large for a test are replaced on the command line."""
    rows = [{"text": row["text"], "translation": row["text"][::-1]} for row in random_documents(40)]
    if recipe == "scores":
        texts = ("anchor", "positive", "negative_1", "negative_2", "negative_3")
        rows = [dict.fromkeys(texts, row["text"]) | {"label": [3.0, 1.0, 0.5, 0.0]} for row in rows]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    folder = RECIPES.parent / "pretraining" if recipe == "distilbert" else RECIPES
    options = f"--config {folder}/{recipe}.yaml --train_data {data} --output_dir {tmp_path}/out --max_steps 2 "
    options += "--dataloader_num_workers 0 "
    if recipe == "distilbert":
        options += f"--model_name_or_path {masked_lm_folder} --masked_teachers {masked_lm_folder} "
        pretraining.main((options + "--sequence_length 60 --per_device_train_tokens 120").split())
    else:
        options += f"--model_name_or_path {model_folder} "
        options += (
            "--score_column label " if recipe == "scores" else f"--structural_teacher truncate:{model_folder}:40 "
        )
        if "contextual" in (folder / f"{recipe}.yaml").read_text():
            options += f"--contextual_teacher chunk-mean:{model_folder}:16 --contextual_head_dims 8 "
        if recipe == "three_layers":
            options += "--keep_layers every_other "
        if recipe == "dcca":
            options += "--contextual_width 4 "
        distillation.main((options + "--per_device_train_batch_size 33").split())
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()
