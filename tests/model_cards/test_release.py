"""The folder of a released model: built from a base and a difference, the same bits as what was judged, or nothing."""

import hashlib
import json
import subprocess

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from common.errors import UserError
from model_cards import build, keep
from model_cards.release import CARDS, DIFFERENCE, Release, base_folder
from tests.modeling_longembed.tiny_checkpoints import SAVED_BESIDE_CODE, random_text

TEXTS = [random_text(n, seed=n) for n in (70, 3, 45)]


@pytest.mark.promise("X7")
def test_what_is_built_is_what_was_kept_and_loads_as_it_stands(tiny, trained, base, tmp_path, capsys):
    trained.save_pretrained(tmp_path / "trained")
    keep.main(["tiny", "--model", str(tmp_path / "trained"), "--base", str(base)])
    kept = dict(reversed(line.split("  ")) for line in (tiny.folder / "SHA256SUMS").read_text().splitlines())
    build.main(["tiny", "--base", str(base), "--output_dir", str(tmp_path / "one")])
    assert "those that were judged" in capsys.readouterr().out
    weights = (tmp_path / "one" / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == kept["model.safetensors"]
    files = {str(p.relative_to(tmp_path / "one")) for p in (tmp_path / "one").rglob("*") if p.suffix != ".py"}
    assert files == SAVED_BESIDE_CODE | {"SHA256SUMS", "recipe.yaml", "1_Pooling"}
    check = subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=tmp_path / "one", check=False)
    assert check.returncode == 0
    assert "end" in ModelCard.load(tmp_path / "one" / "README.md").text

    loaded = AutoModel.from_pretrained(tmp_path / "one")
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, trained.state_dict()[name], rtol=0, atol=0.01 * 6 / 254)
    assert loaded.token_output.head.weight.equal(trained.token_output.head.weight)
    own = json.loads((tmp_path / "trained" / "config.json").read_text())
    assert json.loads((tmp_path / "one" / "config.json").read_text()) == own
    vectors = zip(loaded.encode(TEXTS), trained.encode(TEXTS), strict=True)
    assert all(float(ours @ theirs) > 0.999 for ours, theirs in vectors)


@pytest.mark.promise("X7")
def test_another_base_and_other_weights_are_refused_and_leave_nothing(tiny, trained, base, tmp_path):
    tiny.keep(trained, base)
    other = tmp_path / "base"
    other.mkdir()
    for file in base.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(other / "model.safetensors")
    next(iter(weights.values()))[0] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="org/base as it was released"):
        tiny.build(other, tmp_path / "out")

    kept = load_file(tiny.folder / DIFFERENCE)
    name = next(name for name in kept if name.endswith(":step"))
    kept[name] *= 2
    digest = hashlib.sha256((base / "model.safetensors").read_bytes()).hexdigest()
    save_file(kept, tiny.folder / DIFFERENCE, metadata={"base_sha256": digest})
    with pytest.raises(UserError, match="those that were judged"):
        tiny.build(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_code_is_named_and_no_reason_to_refuse(tiny, trained, base, tmp_path):
    tiny.keep(trained, base)
    sums = tiny.folder / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    place = next(n for n, line in enumerate(lines) if line.endswith("  packing_longembed.py\n"))
    lines[place] = "0" + lines[place][1:] if lines[place][0] != "0" else "1" + lines[place][1:]
    sums.write_text("".join(lines))
    assert tiny.build(base, tmp_path / "out") == ["packing_longembed.py"]


def test_names_that_do_not_exist_are_told_in_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"longembed-minilm"):
        Release.named("longembed-maxilm")
    with pytest.raises(UserError, match="pip install no-such-package"):
        base_folder("no-such-package")
    with pytest.raises(UserError, match="no folder of an encoder"):
        base_folder(str(tmp_path))


@pytest.mark.parametrize("folder", sorted(path.parent for path in CARDS.glob("*/recipe.yaml")), ids=lambda p: p.name)
def test_a_released_card_and_its_metadata_are_what_the_hub_reads(folder):
    card = ModelCard.load(folder / "README.md")
    recipe = Release(folder).recipe
    assert card.data.base_model == recipe["base"]
    assert card.data.license
    assert recipe["repository"] in card.text
    assert (folder / DIFFERENCE).stat().st_size <= 30_000_000


@pytest.mark.slow
@pytest.mark.parametrize("folder", sorted(path.parent for path in CARDS.glob("*/recipe.yaml")), ids=lambda p: p.name)
def test_a_released_model_is_built_bit_by_bit(folder, tmp_path):
    package = Release(folder).recipe["base_package"]
    pytest.importorskip(package.replace("-", "_"), reason=f"needs the package {package}")
    Release(folder).build(base_folder(package), tmp_path / folder.name)  # raises if the weights are others
    vectors = AutoModel.from_pretrained(tmp_path / folder.name).encode(["a garden", "gardens", "the price of steel"])
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
