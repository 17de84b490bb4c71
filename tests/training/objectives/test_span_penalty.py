"""The span penalty enters a step once, with gradient caching, gradient accumulation and two processes."""

import json
from itertools import pairwise

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError
from modeling_longembed import LongEmbedModel
from tests.fresh_processes import with_fresh_processes
from tests.training.tiny_training import random_pairs, tiny_config, write_jsonl
from tests.two_processes import in_two_processes
from training.contrastive import main
from training.data.packing import pack
from training.data.pairs.batches import PairBatch
from training.models.tuning import TuningArguments, select_parameters
from training.objectives.contrastive.arguments import ObjectiveArguments
from training.objectives.contrastive.info_nce import InfoNCE
from training.objectives.pair_step import pair_gradient
from training.objectives.span_penalty import SpanArguments, span_groups, span_penalty

PAIRS, MAX_SPAN, WEIGHT = 4, 20, 0.01
PATTERN = {"type": "adaptive", "max_span": MAX_SPAN, "ramp": 4, "initial_span": 10}


def model(**changes) -> LongEmbedModel:
    torch.manual_seed(1)
    return LongEmbedModel(tiny_config(attention_patterns=PATTERN, **changes)).double()


def batch(budget: int, seed: int) -> PairBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 40, (2 * PAIRS,), generator=generator).tolist()
    texts = [torch.randint(5, 31, (length,), generator=generator).tolist() for length in lengths]
    ids = torch.arange(2 * PAIRS) + 100 * seed
    return PairBatch(pack(texts, budget), ids, PAIRS, sum(lengths), (max(lengths),) * 2, 0)


def gradients(model, weight: float, budget: int, wrapped=None, seeds=(0, 1)) -> dict[str, torch.Tensor]:
    """The gradients of one step that accumulates over two batches."""
    objective = InfoNCE(ObjectiveArguments(), model)
    accumulate = pair_gradient(objective, penalty=span_penalty(model, SpanArguments(span_penalty_weight=weight)))
    for number, seed in enumerate(seeds):
        accumulate(wrapped or model, batch(budget, seed), 1 / len(seeds), number == len(seeds) - 1)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_penalised_once(without: dict, penalised: dict):
    """Closed form: the penalty is the mean over H heads of max_span * fraction; its slope is max_span / H per head."""
    for name, gradient in without.items():
        extra = WEIGHT * MAX_SPAN / 4 if name.endswith("own.fraction") else 0.0
        torch.testing.assert_close(penalised[name], gradient + extra, atol=1e-10, rtol=0)


@pytest.mark.promise("A7")
@pytest.mark.parametrize("budget", [10**6, 50], ids=["one chunk", "gradient caching"])
def test_the_penalty_gets_its_gradient_once_a_step(budget):
    plain = gradients(model(), 0.0, 10**6)
    assert all(plain[f"layers.{layer}.attention.own.fraction"].abs().min() > 0 for layer in (0, 2))
    assert_penalised_once(plain, gradients(model(), WEIGHT, budget))


def of_one_process(rank: int) -> dict:
    """What one of two processes computes."""
    results = {}
    for budget in (10**6, 50):
        for weight in (0.0, WEIGHT):
            base = model()
            wrapped = DistributedDataParallel(base, broadcast_buffers=False)
            # Twice: the state after one step must not affect the next one.
            for _ in range(2):
                base.zero_grad()
                results[budget, weight] = gradients(base, weight, budget, wrapped, seeds=(rank, 2 + rank))
    return results


@with_fresh_processes
@pytest.mark.promise("A7")
def test_two_processes_add_the_penalty_as_one_does(tmp_path):
    first, second = in_two_processes(of_one_process, tmp_path)
    for budget in (10**6, 50):
        assert_penalised_once(first[budget, 0.0], first[budget, WEIGHT])
        for name, gradient in first[budget, WEIGHT].items():
            torch.testing.assert_close(second[budget, WEIGHT][name], gradient, atol=1e-12, rtol=0)


def test_spans_have_a_learning_rate_of_their_own_and_no_decay():
    base = model()
    groups = span_groups(base, SpanArguments(span_learning_rate=0.25), weight_decay=0.5)
    assert [id(p) for p in groups[-1]["params"]] == [id(span.fraction) for span in base.adaptive_spans()]
    assert (groups[-1]["lr"], groups[-1]["weight_decay"]) == (0.25, 0.0)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in base.parameters())
    assert all("lr" not in group for group in groups[:-1])


def test_under_lora_the_spans_stay():
    base = model()
    select_parameters(base, TuningArguments(tuning="lora"))
    before = len(span_groups(base, SpanArguments(), 0.1))
    assert before == 1
    for option in ("span_penalty_weight", "span_learning_rate"):
        with pytest.raises(UserError, match=rf"^--{option} 0.1: the spans do not train; use --tuning full$"):
            span_penalty(base, SpanArguments(**{option: 0.1}))
    assert span_penalty(base, SpanArguments()) is not None  # their mean is reported


@pytest.fixture
def train_spans(tmp_path, word_tokenizer):
    """Run the script on a model with this pattern; returns the lines of metrics.jsonl and the trained model."""

    def run(pattern, options):
        torch.manual_seed(0)
        LongEmbedModel(tiny_config(attention_patterns=pattern)).save_pretrained(tmp_path / "model")
        word_tokenizer.save_pretrained(tmp_path / "model")
        data, output = write_jsonl(tmp_path / "pairs.jsonl", random_pairs(16)), tmp_path / "out"
        given = f"--model_name_or_path {tmp_path}/model --train_data {data} --output_dir {output} --max_steps 6 "
        given += "--per_device_train_batch_size 8 --dataloader_num_workers 0 --report_to none --logging_steps 1 "
        main((given + options).split())
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return lines, LongEmbedModel.from_pretrained(output / "final")

    return run


def test_the_script_shortens_spans_and_reports_them(train_spans):
    options = "--span_penalty_weight 0.1 --span_learning_rate 0.05 --lr_scheduler_type constant --batch_tokens 60"
    lines, trained = train_spans(PATTERN, options)
    spans = [line["mean_span"] for line in lines]
    assert spans[0] == 10  # before the first step
    assert all(after < before for before, after in pairwise(spans))
    # AdamW moves a fraction by about its learning rate: 6 steps of 0.05 of 20 tokens.
    assert trained.span_penalty().item() / 2 == pytest.approx(4, abs=1)


@pytest.mark.parametrize("option", ["span_penalty_weight", "span_learning_rate"])
def test_the_script_refuses_options_of_spans_without_one(train_spans, option):
    with pytest.raises(UserError, match=rf"^--{option} 1.0: no attention pattern .* leave --{option} out$"):
        train_spans("full", f"--{option} 1")
