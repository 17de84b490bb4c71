"""A saved adapter comes back as it was, or not at all."""

import base64
import json
from typing import Any

import pytest
import torch
from peft import PeftModel

from common.errors import UserError
from modeling_longembed import LongEmbedModel
from tests.fake_hub import COMMIT, fake_hub
from tests.training.tiny_training import tiny_config
from training.data.packing import pack
from training.engine.saving import WHOLE_WEIGHTS, HubArguments, load_adapter, push, save_adapter
from training.models.tuning import TuningArguments, select_parameters
from training.objectives.embed import embed

TEXTS = pack([[2, 7, 8, 9, 3], [2, *range(5, 31), *range(5, 31), 3], [2, 11, 3]], 1000)[0]


def fresh(**changes) -> LongEmbedModel:
    torch.manual_seed(5)
    return LongEmbedModel(tiny_config(**changes)).eval()


@pytest.mark.promise("M5")
def test_longlora_comes_back_bitwise_from_the_adapter_and_its_extra_file(tmp_path):
    adapted = select_parameters(fresh(), TuningArguments(tuning="longlora"))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:  # as if it had been trained
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_adapter(adapted, "longlora", tmp_path)
    loaded = load_adapter(fresh(), tmp_path)
    assert embed(loaded, TEXTS).equal(embed(adapted, TEXTS))
    # The adapter alone is another model, as peft loads it: the extra file is needed, and asked for.
    assert not embed(PeftModel.from_pretrained(fresh(), str(tmp_path)), TEXTS).equal(embed(adapted, TEXTS))
    (tmp_path / WHOLE_WEIGHTS).unlink()
    with pytest.raises(UserError, match=f"{WHOLE_WEIGHTS} is missing"):
        load_adapter(fresh(), tmp_path)


def test_publishing_needs_a_name():
    with pytest.raises(UserError, match=r"--push_to_hub needs --hub_model_id org/name"):
        HubArguments(push_to_hub=True)


# --- the upload -----------------------------------------------------------------------------------------------------


def failing(stage: str, status: int):
    """A Hub that fails at the creation of the repository, or at the upload into it."""

    def answer(method, path):
        # A repository that exists (409 at its creation) is what is wanted: the upload into it fails.
        if stage == "create" or path != "/api/repos/create":
            return status, {}, b'{"error": "something\\nin two lines", "url": "http://127.0.0.1/org/name"}'
        return 200, {}, json.dumps({"url": "http://127.0.0.1/org/name", "type": "user", "name": "x"}).encode()

    return answer


@pytest.fixture
def final(tmp_path):
    folder = tmp_path / "a run" / "final"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("stage", ["create", "upload"])
@pytest.mark.parametrize(
    ("status", "named"),
    [
        (0, "disconnected|reset|closed|aborted"),
        (400, "400"),
        (401, "401.*hf auth login"),
        (403, "403.*may not write"),
        (404, "404"),
        (409, "409.*try again"),
        (413, "413.*max_shard_size"),
        (429, "429.*wait"),
        (500, "500.*later"),
        (503, "503.*later"),
    ],
)
def test_an_upload_that_fails_says_in_one_sentence_why_and_how_to_go_on(status, named, stage, final, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_fake")
    with (
        fake_hub(monkeypatch, final.parent / "cache", failing(stage, status)) as hub,
        pytest.raises(UserError, match=named) as error,
    ):
        push(final, "org/name", private=True)
    assert ("POST", "/api/repos/create") in hub.requests
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(f"uploads it: hf upload org/name '{final}' --private")
    assert [path.name for path in final.iterdir()] == ["config.json"]


def taking_everything(method, path):
    """A Hub on which an upload succeeds, into the repository and not into a large-file storage."""
    found: dict[str, Any] = {"url": "http://127.0.0.1/org/name", "type": "user", "name": "x"}
    if path.startswith("/api/models/org/name/preupload/"):
        files = ("config.json", "deep/weights.bin")
        found = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in files]}
    elif path.startswith("/api/models/org/name/commit/"):
        url = f"http://127.0.0.1/org/name/commit/{COMMIT}"
        found = {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""}
    return 200, {}, json.dumps(found).encode()


@pytest.mark.parametrize("private", [True, False])
def test_an_upload_sends_every_file_as_it_is_in_one_commit(private, final, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_fake")
    (final / "deep").mkdir()
    (final / "deep" / "weights.bin").write_bytes(bytes(range(256)) * 5)
    with fake_hub(monkeypatch, final.parent / "cache", taking_everything) as hub:
        push(final, "org/name", private=private)
    paths = ("repos/create", "models/org/name/preupload/main", "models/org/name/commit/main")
    assert hub.requests == [("POST", f"/api/{path}") for path in paths]
    created = json.loads(hub.bodies[0])
    assert (created["organization"], created["name"]) == ("org", "name")
    # Older releases of huggingface_hub say it in another field.
    assert created.get("visibility", "private" if created.get("private") else "public") == (
        "private" if private else "public"
    )
    _, *files = map(json.loads, hub.bodies[-1].splitlines())
    assert {line["key"] for line in files} == {"file"}
    assert {line["value"]["encoding"] for line in files} == {"base64"}
    sent = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in files}
    assert sent == {str(file.relative_to(final)): file.read_bytes() for file in final.rglob("*") if file.is_file()}


def test_an_upload_without_a_connection_says_so(final, monkeypatch):
    with fake_hub(monkeypatch, final.parent / "cache", failing("create", 500)) as hub:
        hub.close()
        with pytest.raises(UserError, match=r"refused.*hf upload org/name") as error:
            push(final, "org/name", private=False)
    assert "--private" not in str(error.value)


def test_an_upload_offline_says_so(final):
    with pytest.raises(UserError, match=r"(?i)offline.*hf upload"):
        push(final, "org/name", private=False)


@pytest.mark.parametrize("name", ["a/b/c", "-x/y", "org/name.git"])
def test_a_name_that_the_hub_does_not_allow_is_refused(name, final, monkeypatch):
    with (
        fake_hub(monkeypatch, final.parent / "cache", failing("create", 400)),
        pytest.raises(UserError, match=name) as error,
    ):
        push(final, name, private=False)
    assert "\n" not in str(error.value)
