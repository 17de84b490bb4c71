"""What `pip install longembed` brings: the model alone, with no more dependencies than its code imports."""

import email
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build")
pytest.importorskip("hatchling")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_the_wheel_holds_the_model_alone(wheel):
    packaged = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packaged == {f"modeling_longembed/{path.name}" for path in (ROOT / "modeling_longembed").glob("*.py")}


def test_the_wheel_carries_its_licence_and_needs_three_libraries(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    needed = {line.split(">")[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert needed == {"torch", "transformers", "safetensors"}
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"train", "eval", "search", "demo", "dev", "flash"} <= set(metadata.get_all("Provides-Extra"))
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())


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
