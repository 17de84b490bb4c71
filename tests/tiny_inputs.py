"""A folder of tiny inputs, and for every script a command line that ends well with them."""

import random
from pathlib import Path

import torch
import yaml

from modeling_longembed import LongEmbedForMaskedLM, LongEmbedModel
from tests.eval.task_files import write_rows
from tests.modeling_longembed.tiny_checkpoints import save_checkpoint
from tests.training.tiny_training import WORDS, random_documents, random_pairs, tiny_config, word_tokenizer, write_jsonl

TRAINING = "--train_data {data} --output_dir out --max_steps 2 --logging_steps 1 --dataloader_num_workers 0 --dropout 0"
PAIRS = TRAINING.format(data="in/pairs.jsonl") + " --per_device_train_batch_size 8 --max_length 64"
TEXTS = TRAINING.format(data="in/documents.jsonl")
TOKENS = "--per_device_train_tokens 240 --sequence_length 16:0.5 60:0.5"
# Relative to a folder with the inputs in `in`; `out` is written. eval.plot reads what eval.mteb_long writes,
# and retrieval.search and retrieval.tune read the index of retrieval.build.
COMMANDS = {
    "training.contrastive": f"--model_name_or_path in/model {PAIRS}",
    "training.distillation": f"--model_name_or_path in/model {TEXTS} --per_device_train_batch_size 8 --max_length 64 "
    "--structural_teacher chunk-mean:in/model:16 --contextual_teacher truncate:in/model:24 --contextual_head_dims 12",
    "training.compression": f"--model_name_or_path in/model {TEXTS} {TOKENS} --student_hidden_size 16 "
    "--relation_heads 8",
    "training.pretraining": f"--model_name_or_path in/bert {TEXTS} --per_device_train_tokens 120 --sequence_length 30 "
    "--eval_data in/documents.jsonl",
    "training.layout_search": f"--model_name_or_path in/model {PAIRS} --weight_steps 1 --cycle_steps 2 "
    "--architecture_share 0.4 --changed_share 0 --max_steps 3",
    "training.mine_negatives": "--model in/model --data in/pairs.jsonl --output out/mined.jsonl --num_negatives 1",
    "training.paragraph_vector": "--train_data in/documents.jsonl --output_dir out --vector_size 8 --epochs 2",
    "training.pruning": "--model_name_or_path in/model --eval_data in/pairs.jsonl --depth 1 --output_dir out",
    "training.token_output": "--model_name_or_path in/model --train_data in/documents.jsonl --output_dir out "
    "--token_dim 8 --query_token_weights idf",
    "training.vocabulary": "--model_name_or_path in/model --train_data in/documents.jsonl --output_dir out",
    "eval.mteb_long": "--model in/model chunk-mean:in/model:16 bm25 hybrid:in/model@tokens:pool=2:0.5 "
    "--data_dir in/tasks --output_dir out",
    "eval.sts": "--model in/model --data_dir in/sts --output_dir out",
    "eval.passkey": "--model in/model --lengths 64 --depths 2 --trials 2 --output_dir out",
    "eval.perplexity": "--model in/masked_lm --data in/documents.jsonl --lengths 16 --tokens_scored 2 --draws 1 "
    "--documents 2 --output_dir out",
    "eval.questions": "--data in/questions.jsonl --output_dir out/Task",
    "eval.synthetic": "--output_dir out --tokenizer in/model --tasks passkey --lengths 64 --queries 2 --documents 3",
    "eval.plot": "--results_dir in/results --output out/plot.png",
    "retrieval.build": "--model in/model --data in/documents.jsonl --index out --segments late:8",
    "retrieval.search": "--index in/index --model in/model --query river",
    "retrieval.tune": "--index in/index --model in/model --queries in/judged.jsonl",
}
# Inputs that a script is there to change.
CHANGED = {"retrieval.tune": "in/index/"}


def write_inputs(folder: Path) -> None:
    """Write models of ours and one to convert, pairs, documents, tasks, and a recipe of the data's settings."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    for name, kind in (("model", LongEmbedModel), ("masked_lm", LongEmbedForMaskedLM)):
        model = kind(tiny_config(initializer_range=0.5))
        model.tokenizer = word_tokenizer()
        model.save_pretrained(folder / name)
    save_checkpoint(folder / "bert", "bert", with_head=True)
    write_jsonl(folder / "pairs.jsonl", random_pairs(24))
    write_jsonl(folder / "documents.jsonl", random_documents(24))
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(3, 40))) for _ in range(12)]
    task = folder / "tasks" / "Words"
    write_rows(task / "corpus.jsonl", [{"doc_id": f"d{n}", "text": text} for n, text in enumerate(texts)])
    write_rows(task / "queries.jsonl", [{"qid": f"q{n}", "text": text[:20]} for n, text in enumerate(texts[:4])])
    write_rows(task / "qrels.jsonl", [{"qid": f"q{n}", "doc_id": f"d{n}"} for n in range(4)])
    rows = [{"sentence1": texts[n], "sentence2": texts[n + 1], "score": float(n % 5)} for n in range(8)]
    write_rows(folder / "sts" / "Alike.jsonl", rows)
    answers = [{"question": f"what is {n}", "long_answer": text} for n, text in enumerate(texts)]
    write_rows(folder / "questions.jsonl", answers)
    judged = [{"query": text, "documents": [f"documents.jsonl:{n + 1}"]} for n, text in enumerate(texts[:4])]
    write_rows(folder / "judged.jsonl", judged)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"seed": 1}))
