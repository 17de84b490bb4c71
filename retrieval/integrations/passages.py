"""What a retriever of another library returns: the passages that a search finds, and where each of them stands."""

from collections.abc import Iterator, Mapping
from threading import Lock
from typing import Any

from common.errors import UserError
from retrieval.index.index import Index
from retrieval.ranking import Hit, Passage

# What `Index.search` can be asked for; each is an attribute of a retriever.
OPTIONS = ("k", "passages", "candidates", "weight", "parts", "filters")
# Metadata that are no words for a language model.
NUMBERS = ("start", "end", "score", "passage_score", "parts")
# Libraries call a retriever in many threads at a time, and the tokenizer and the model serve one.
_ONE_AT_A_TIME = Lock()


def find_passages(
    index: Index, query: str, retriever: Any, changed: Mapping[str, Any] | None = None
) -> Iterator[tuple[Hit, Passage]]:
    """Search an index for passages.

    Args:
        index: what is searched.
        query: the text.
        retriever: an object whose attributes are the `OPTIONS`.
        changed: options that are others in this search.

    Yields:
        Each passage and its document: those of the best document first, and of each document its best first.

    Raises:
        UserError: as `Index.search`, or not even one passage of a document is wanted.
    """
    options = {name: getattr(retriever, name) for name in OPTIONS} | dict(changed or {})
    if unknown := options.keys() - set(OPTIONS):
        raise UserError(f"a search has no option {min(unknown)}; it has {', '.join(OPTIONS)}")
    if options["passages"] == 0:
        raise UserError("passages 0: passages are all that is returned; give at least 1")
    with _ONE_AT_A_TIME:
        hits = index.search(query, **options)
    for hit in hits:
        for passage in hit.passages:
            yield hit, passage


def passage_id(hit: Hit, passage: Passage) -> str:
    """Return what names a passage: its document and its characters."""
    return f"{hit.id}:{passage.start}-{passage.end}"


def passage_metadata(hit: Hit, passage: Passage) -> dict[str, Any]:
    """Return what is known about a passage, and about its document.

    Args:
        hit: the document.
        passage: one of its passages.

    Returns:
        The metadata of the document, and, in the place of any that are called so, its id as `document`, its `score` and
        `parts`, and the `start`, `end`, `passage_score` and, if they are known, `page` and `heading` of the passage.
    """
    place = {"start": passage.start, "end": passage.end, "page": passage.page, "heading": passage.heading}
    known = {name: value for name, value in place.items() if value is not None}
    scores = {"score": hit.score, "passage_score": passage.score, "parts": dict(hit.parts)}
    return {**hit.metadata, "document": hit.id, **known, **scores}
