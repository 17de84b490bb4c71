"""`retrieval.serve` begins with what its user can mend most easily."""

import sys

import pytest

from common.errors import run
from retrieval import Index, serve
from tests.retrieval.conftest import make_documents


def test_the_index_is_missed_before_a_package_is(tmp_path, tiny_model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "retrieval.server.process", raising=False)

    def errors() -> str:
        monkeypatch.setattr(sys, "argv", ["serve", "--index", str(tmp_path / "index")])
        with pytest.raises(SystemExit, match="2"):
            run(serve.main)
        return capsys.readouterr().err

    assert errors().startswith(f"error: {tmp_path / 'index'}")
    Index.build(tmp_path / "index", make_documents(1), tiny_model, segments="late:8", parts="words").close()
    assert "needs uvicorn" in (told := errors())
    assert "pip install -e '.[serve]'" in told  # zsh takes brackets without quotes for a pattern of file names
