"""README, CONTRIBUTING and docs/: links lead somewhere, pages are short, snippets work, and the site builds.

What is executed, and what is only read:

- The first Python block of README runs as it stands, in a process that has torch, transformers, safetensors and
  modeling_longembed alone, with the encoder that it names in a fake cache of the Hub.
- All other Python blocks run in this process, those of a page one after the other in one namespace and in an empty
  folder, in which the encoder has its Hub name and `you/your-model` is a tiny model. Functions called `test_...` are
  called. A block after a comment `<!-- not run: reason -->` is compiled only, and one after `<!-- needs PACKAGE -->`
  where the package is missing.
- Shell blocks are expanded by bash with stubs for the commands. What a command of ours would get is parsed by the
  script's own dataclasses (options exist, values have their type, recipes exist), and then nothing runs. `accelerate`,
  `torchrun`, `make`, `pip` and `hf` are read by their own parsers, the Makefile and pyproject.toml.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest

from tests.modeling_longembed.clean_environment import CleanEnvironment
from tests.modeling_longembed.model.test_hub import fake_hub
from tests.modeling_longembed.tiny_checkpoints import CONTEXT, save_checkpoint

ROOT = Path(__file__).parents[2]
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
GENERATED = [
    ROOT / "docs" / "reference" / folder
    for folder in ("training", "eval", "retrieval", "model_cards", "experiments", "api")
]
WORDS = 1500

_spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
make_reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make_reference)


def written_by_hand(folder: Path) -> list[Path]:
    """The Markdown pages of `folder` that no script makes."""
    return [path for path in sorted(folder.rglob("*.md")) if path.parent not in GENERATED]


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *written_by_hand(ROOT / "docs")]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[tuple[str, bool]]:
    """The fenced blocks of these languages, without their indentation, and whether each is marked as not run here."""
    mark = r"(?:<!-- (not run: .+?|needs (\w+)) -->\n)?"
    fence = re.compile(mark + r"^( *)```(\w*)\n(.*?)^\3```$", re.DOTALL | re.MULTILINE)
    return [
        (
            re.sub(rf"^{indent}", "", code, flags=re.MULTILINE),
            bool(mark) and not (package and importlib.util.find_spec(package)),
        )
        for mark, package, indent, language, code in fence.findall(page.read_text(encoding="utf-8"))
        if language in languages
    ]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", title) for title in titles]
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in plain}


# --- pages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name)
def test_links_and_anchors_lead_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", written_by_hand(ROOT / "docs"), ids=name)
def test_a_page_is_short(page):
    if page.name != "promises.md":  # a register, which grows with the tests
        assert len(prose(page).split()) < WORDS


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_page_names_exist(page):
    folders = "training|eval|retrieval|model_cards|experiments|modeling_longembed|common|tests|docs"
    named = re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]+\.(?:py|yaml|md|png)\b", page.read_text(encoding="utf-8"))
    examples = r"strided|logarithmic|triplet"  # files that CONTRIBUTING would have one write
    assert not [path for path in named if not (ROOT / path).exists() and not re.search(examples, path)]


def test_pages_that_the_code_names_exist():
    named = {}
    for folder in (
        "training",
        "eval",
        "retrieval",
        "model_cards",
        "experiments",
        "modeling_longembed",
        "common",
        "tests",
    ):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml"):
                for page in re.findall(r"docs/[\w/-]+\.md", path.read_text(encoding="utf-8")):
                    named.setdefault(page, name(path))
    assert not {page: path for page, path in named.items() if not (ROOT / page).exists()}


def test_every_figure_is_shown():
    shown = {
        (page.parent / link).resolve()
        for page in PAGES
        for link in re.findall(r"!\[.*?\]\((\S+?)\)", page.read_text(encoding="utf-8"))
    }
    assert set((ROOT / "docs" / "images").iterdir()) <= shown


# --- Python ---------------------------------------------------------------------------------------------------------


def test_the_first_snippet_of_the_readme_runs_as_it_stands(minilm, tmp_path):
    (snippet, _), *_ = blocks(ROOT / "README.md", "python")
    environment = CleanEnvironment(tmp_path, ["torch", "transformers", "safetensors"])
    (environment.packages / "modeling_longembed").symlink_to(ROOT / "modeling_longembed")  # what `pip install .` gives
    fake_hub(tmp_path / "hf", ENCODER, {"0" * 40: minilm}, listed=True)
    process = environment.run(snippet)
    assert process.returncode == 0, process.stderr
    scores = re.findall(r"\[ *(\S+) +(\S+?) *\]", process.stdout)
    (first, second), (third, fourth) = [map(float, row) for row in scores]
    assert first > second  # each question finds the document that answers it, in its last sentence
    assert fourth > third


@pytest.fixture(scope="module")
def reader_folder(minilm, tmp_path_factory) -> Path:
    """A working folder in which the names of the snippets exist."""
    from modeling_longembed import LongEmbedModel

    folder = tmp_path_factory.mktemp("reader")
    (folder / "sentence-transformers").mkdir()
    (folder / ENCODER).symlink_to(minilm, target_is_directory=True)
    save_checkpoint(folder / "bert", "bert")
    prompts = {"query": "w1 ", "document": "w2 "}
    model = LongEmbedModel.from_encoder(folder / "bert", 4 * CONTEXT, "repeat", prompts=prompts)
    model.save_pretrained(folder / "you" / "your-model")
    return folder


@pytest.fixture
def _registries():
    """What CONTRIBUTING registers is forgotten again."""
    from modeling_longembed.pattern_registry_longembed import PATTERNS
    from modeling_longembed.position_schemes_longembed import POSITION_SCHEMES
    from training.objectives.contrastive.registry import OBJECTIVES

    registries = (PATTERNS, POSITION_SCHEMES, OBJECTIVES)
    kept = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, kept, strict=True):
        registry.clear()
        registry.update(entries)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
@pytest.mark.usefixtures("_registries")
def test_python_runs(page, reader_folder, monkeypatch):
    monkeypatch.chdir(reader_folder)
    namespace = {"__name__": "snippet"}
    for number, (code, marked) in enumerate(blocks(page, "python")):
        compiled = compile(code, f"{name(page)}, block {number}", "exec")
        if not marked and not (number == 0 and page.name == "README.md"):  # that one has a test of its own
            exec(compiled, namespace)
    for function in [value for key, value in namespace.items() if key.startswith("test_")]:
        function()


# --- commands -------------------------------------------------------------------------------------------------------

STUBS = """
set -eu
record() { printf '%s\\037' "$@" >&3; printf '\\036' >&3; }
for command in python accelerate torchrun make pip hf; do eval "$command() { record $command \\"\\$@\\"; }"; done
FIRST_MACHINE=first.example
"""


def commands(block: str, folder: Path) -> list[list[str]]:
    """The commands of a shell block as bash would start them; one that has no stub fails."""
    record = folder / "commands"
    process = subprocess.run(
        [shutil.which("bash"), "-c", f"exec 3>{shlex.quote(str(record))}\n{STUBS}\n{block}"],
        cwd=folder,
        env={"PATH": ""},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return [line.split("\037")[:-1] for line in record.read_text(encoding="utf-8").split("\036")[:-1]]


def check_command(command: list[str]) -> None:
    """Parse a command as what it starts would, without starting it."""
    program, *arguments = command
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= {*targets}
    elif program == "pip":
        extras = set(metadata("longembed").get_all("Provides-Extra"))
        assert arguments[0] == "install"
        assert set(re.findall(r"[\w-]+", "".join(re.findall(r"\[(.*)\]", arguments[-1])))) <= extras
    elif program == "hf":
        from training import hf_job

        place = arguments.index("training/hf_job.py")
        hf_job.main(["--dry_run", *arguments[place + 1 :]])
        check_command(["python", *arguments[arguments.index("training/contrastive.py") :]])
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args(arguments)
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert arguments[0] == "launch"
        launch = launch_command_parser().parse_args(arguments[1:])
        assert launch.config_file is None or (ROOT / launch.config_file).is_file()
        module = ["-m"] if launch.module else []
        check_command(["python", *module, launch.training_script, *launch.training_script_args])
    elif arguments[:1] == ["-m"]:
        assert importlib.util.find_spec(arguments[1])
        script = Path(*arguments[1].split(".")).with_suffix(".py")
        if script in make_reference.scripts():
            make_reference.parse_command(script, arguments[2:])
    else:
        make_reference.parse_command(Path(arguments[0]), arguments[1:])


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")], ids=name)
def test_commands_can_be_given(page, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # recipes are named from there
    found = [command for block, _ in blocks(page, "bash") for command in commands(block, tmp_path)]
    assert found
    for command in found:
        try:
            check_command(command)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{shlex.join(command)}: {error}")


# --- the site -------------------------------------------------------------------------------------------------------


def test_option_tables_are_those_of_the_scripts():
    stale = [
        name(path)
        for path, text in make_reference.pages().items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    ]
    assert not stale, "run `make reference`"


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    process = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9"},  # nothing is fetched
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert (tmp_path / "site" / "search" / "search_index.json").is_file()
    pages = [*(ROOT / "docs").rglob("*.md")]
    assert {path.relative_to(ROOT / "docs").with_suffix(".html") for path in pages} <= {
        path.relative_to(tmp_path / "site") for path in (tmp_path / "site").rglob("*.html")
    }
