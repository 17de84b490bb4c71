"""Actors of a Ray cluster of two nodes: each document once, with the vectors of one process, whatever is killed."""

import os
import signal
import threading
import time
from collections import Counter
from itertools import chain

import numpy as np
import pytest

from common.errors import UserError
from retrieval.documents.sources import Columns, read_documents
from retrieval.documents.storage import Storage
from retrieval.embedding import ray_actors
from retrieval.embedding.embedded import Embedded
from retrieval.embedding.plan import begin
from retrieval.embedding.ray_actors import Work, embed_with_ray
from retrieval.index.index import Index
from retrieval.index.manifest import Settings
from retrieval.index.reading import DocumentReader
from tests.retrieval.conftest import make_documents

pytest.importorskip("ray.data.checkpoint", reason="the extra 'ray' is not installed")
pa = pytest.importorskip("pyarrow", reason="the extra 'files' is not installed")
pytestmark = pytest.mark.slow  # a cluster starts in some 20 s, and an actor in 10

SETTINGS = Settings("late:8", ("vector", "tokens", "words"), "float16", None)


@pytest.fixture(scope="module")
def cluster():
    """Two nodes, each with processes of its own."""
    import ray.data
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 2, "object_store_memory": 100 * 2**20, "memory": 2 * 2**30}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # beside other work, workers would hardly ever run
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        started = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
        started.add_node(**options)
        ray.init(address=started.address, log_to_driver=False)
        context = ray.data.DataContext.get_current()  # of blocks of some documents, instead of 128 MiB
        context.target_min_block_size, context.target_max_block_size = 1, 600
        yield ray
        ray.shutdown()
        started.shutdown()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Parquet of 40 documents whose ids are numbers, and one without text."""
    folder = tmp_path_factory.mktemp("rows")
    documents = make_documents(40)
    for part in range(4):
        mine = documents[part::4]
        table = {
            "doc_id": [document.metadata["number"] for document in mine] + [100 + part] * (part == 0),
            "text": [document.text for document in mine] + [" "] * (part == 0),
        }
        pa.parquet.write_table(pa.table(table), folder / f"{part}.parquet")
    return folder


def work_of(folder, model, name, rows) -> Work:
    reader = DocumentReader(model, SETTINGS)
    plan = begin(Storage(folder), model, reader, read_documents([rows]), 4, "any")
    return Work(str(name), plan, str(folder), Columns(), 16_384)


def kill_an_actor(ray, folder, killed: list[int]) -> None:
    """Kill the process of an actor that embeds when the first documents have been written."""
    while not list(folder.glob("checkpoint/*.parquet")):
        time.sleep(0.01)
    actors = chain.from_iterable([ray._private.state.actors().values()])
    pids = [one["Pid"] for one in actors if one["State"] == "ALIVE" and "MapWorker" in one["ActorClassName"]]
    killed += pids[:1]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.promise("I9")
def test_an_actor_that_is_killed_loses_no_document_and_a_second_run_reads_none(
    tmp_path, cluster, rows, tiny_model, tiny_longembed, in_float32, monkeypatch
):
    folder, killed = tmp_path / "out", list[int]()
    work = work_of(folder, tiny_model, tiny_longembed, rows)
    killer = threading.Thread(target=kill_an_actor, args=(cluster, folder, killed))
    killer.start()
    assert embed_with_ray([rows], work, actors=2)
    killer.join()
    assert killed
    expected = {document.id: document for document in read_documents([rows])}
    found = list(Embedded(folder).records())
    assert Counter(record.document.id for record in found) == Counter(expected.keys())
    local = DocumentReader(tiny_model, SETTINGS)
    for record in found:
        assert record.document == expected[record.document.id]
        (own,) = local([record.document])
        np.testing.assert_allclose(record.vectors, own.vectors, atol=1e-5)
        np.testing.assert_allclose(record.codes, own.codes, atol=2e-3)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("documents/*")}
    assert embed_with_ray([rows], work, actors=1)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("documents/*")} == before
    assert len(Index.merge(tmp_path / "index", folder)) == 40


@pytest.mark.promise("I9")
def test_what_ray_cannot_tell_apart_is_refused_in_a_sentence(tmp_path, cluster, rows, tiny_model, tiny_longembed):
    work = work_of(tmp_path / "out", tiny_model, tiny_longembed, rows)
    for data, told in (
        ([tmp_path / "none"], "no such Parquet file"),
        ([rows, "memory://other"], "no such Parquet file"),
    ):
        with pytest.raises(UserError, match=told):
            embed_with_ray(data, work)
    bare = tmp_path / "bare.parquet"
    pa.parquet.write_table(pa.table({"text": ["river", "stone"], "code": ["1", "1"], "number": [1, 2]}), bare)
    with pytest.raises(UserError, match=r"bare.parquet: the column id is missing, and --engine ray needs ids"):
        embed_with_ray([bare], work)
    twice = ray_actors.replace(work, columns=Columns(id="code"))
    with pytest.raises(UserError, match=r"2 documents have 1 ids \(code\)"):
        embed_with_ray([bare], twice, actors=1)
    other = work_of(tmp_path / "other", tiny_model, tiny_longembed, rows)  # without ids that are done
    numbers = ray_actors.replace(other, columns=Columns(("number",), "code"))
    with pytest.raises(UserError, match="number is int instead of text"):
        embed_with_ray([bare], numbers, actors=1)
