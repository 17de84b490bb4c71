"""An index of documents with pages, headings and metadata."""

import pytest

from retrieval.documents.document import Document, Mark
from retrieval.index.index import Index
from tests.retrieval.conftest import make_documents


@pytest.fixture(scope="module")
def index_with_pages(tiny_model, tmp_path_factory):
    text = "river stone cloud green table.\fpaper music house train north."
    marks = (Mark(0, "page", "1"), Mark(6, "heading", "The stone"), Mark(31, "page", "2"))
    lease = Document("lease.pdf", text, {"number": 100, "score": "of an examination"}, marks)
    folder = tmp_path_factory.mktemp("index") / "index"
    with Index.build(folder, [*make_documents(12), lease], tiny_model, segments="sentences:8") as index_with_pages:
        yield index_with_pages
