"""Take the pictures of the page that the README and docs/guides/serve-an-index.md show.

    python experiments/page_screenshots.py --index runs/space/index --query "How is the work on the Panama canal going?"

It needs the extra `browser` and a Chromium of the system's. `page-search.png` shows what is found in the index,
`page-own-files.png` what is found in a text file of a visitor's.
"""

import io
import shutil
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.arguments import parse
from common.errors import UserError, run
from common.files import atomic_write
from retrieval.index.index import Index
from retrieval.serve import listen

WIDTH, HEIGHT = 960, 860
# Colours of a picture, which has few; a small file.
COLOURS = 64
PATIENCE = 120_000  # milliseconds


@dataclass
class Arguments:
    """The options of the script."""

    index: str = field(metadata={"help": "folder of an index"})
    query: str = field(metadata={"help": "what is asked"})
    model: str | None = field(
        default=None, metadata={"help": "where the model of the index is now, if it is not where it was"}
    )
    file: str = field(default="README.md", metadata={"help": "text file that a visitor searches"})
    file_query: str = field(
        default="How are documents of any length served?", metadata={"help": "what the visitor asks about it"}
    )
    output_dir: str = field(default="docs/images", metadata={"help": "folder of the pictures", "output": "folder"})


def take(page: Any, path: Path) -> None:
    """Write a picture of what a page shows.

    Args:
        page: Playwright's.
        path: of a PNG.
    """
    from PIL import Image

    page.wait_for_timeout(1000)  # until what has been loaded is drawn
    shown = Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(COLOURS)
    data = io.BytesIO()
    shown.save(data, "PNG", optimize=True)
    atomic_write(path, data.getvalue())


def visit(address: str, arguments: Arguments, chromium: str) -> None:
    """Use the page as a visitor does, and take the pictures.

    Args:
        address: of the page.
        arguments: of the script.
        chromium: the browser.
    """
    from playwright.sync_api import sync_playwright

    folder = Path(arguments.output_dir)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.set_default_timeout(PATIENCE)
        page.goto(address)
        question = page.get_by_label("Question")
        question.fill(arguments.query)
        question.press("Enter")
        page.locator("article").first.wait_for()
        take(page, folder / "page-search.png")
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Search text files of your own").click()
        chooser.value.set_files(arguments.file)
        page.get_by_text("Searched now").wait_for()
        question.fill(arguments.file_query)
        question.press("Enter")
        page.locator("article", has_text=Path(arguments.file).name).wait_for()
        take(page, folder / "page-own-files.png")
        browser.close()


def main() -> None:
    """Serve the index, and take pictures of the page.

    Raises:
        UserError: there is no browser, or the index does not open.
    """
    (arguments,) = parse(Arguments)
    index = Index.open(arguments.index, arguments.model)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    try:
        import playwright  # noqa: F401

        from retrieval.server.api import make_app
        from retrieval.server.page import make_page, mount_page
        from retrieval.server.process import make_server
        from retrieval.server.service import Service
    except ImportError as error:
        raise UserError(f"pictures need {error.name}: pip install -e '.[browser]'") from None
    if chromium is None:
        raise UserError("pictures need Chromium: apt-get install chromium")
    with listen("127.0.0.1", 0) as listening:
        service = Service(index)
        server = make_server(mount_page(make_app(service), make_page(service)))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            while not server.started and thread.is_alive():
                time.sleep(0.05)
            visit(f"http://127.0.0.1:{listening.getsockname()[1]}/", arguments, chromium)
        finally:
            server.should_exit = True
            thread.join()
    print(f"{arguments.output_dir}: page-search.png and page-own-files.png")


if __name__ == "__main__":
    run(main)
