"""The page: a box for a question, and what was found. Nothing is loaded from elsewhere, and no files are taken."""

import os
from concurrent.futures import TimeoutError
from typing import Any

from fastapi import FastAPI

from common.errors import UserError
from retrieval.server.service import Service
from retrieval.server.view import message, page_of
from retrieval.server.worker import BusyError

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported and whenever a page is made
import gradio as gr

# Characters of a question.
MAX_QUERY = 100_000
# Searches that wait for each other; one more is refused.
MAX_WAITING = 64


def make_page(service: Service, timeout: float = 60.0) -> gr.Blocks:
    """Make the page.

    Args:
        service: what searches.
        timeout: seconds after which a search is given up.
    """

    def search(query: str, k: float) -> str:
        if len(query) > MAX_QUERY:
            return message(f"The question has more than {MAX_QUERY:,} characters; ask a shorter one.")
        try:
            future = service.look(query, min(50, max(1, int(k))))
        except BusyError as error:
            return message(f"The server is busy: {error}.")
        try:
            return page_of(future.result(timeout))
        except TimeoutError:
            service.worker.cancel([future])
            return message(f"There was no answer after {timeout:g} seconds; try again later.")
        except UserError as error:
            return message(str(error).replace(str(service.index.folder), "the index"))

    with gr.Blocks(title="longembed", analytics_enabled=False) as page:
        gr.Markdown(f"# Search {len(service.index):,} documents")
        query = gr.Textbox(label="Question", max_length=MAX_QUERY, autofocus=True)
        k = gr.Slider(1, 50, 10, step=1, label="Documents")
        button = gr.Button("Search", variant="primary")
        answer = gr.HTML()
        gr.on([query.submit, button.click], search, [query, k], answer, api_visibility="private", concurrency_limit=8)
    page.queue(max_size=MAX_WAITING)
    return page


def look() -> dict[str, Any]:
    """Return how the page looks: with the fonts of the system, since those of the themes come from elsewhere."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return {"theme": theme, "footer_links": []}


def mount_page(app: FastAPI, page: gr.Blocks) -> FastAPI:
    """Make an application serve the page at all paths that it has no other answer for.

    Args:
        app: the server for programs.
        page: the page.

    Returns:
        The application with the page.
    """
    return gr.mount_gradio_app(
        app, page, path="/", **look(), run_history=False, ssr_mode=False, show_error=False, max_file_size=1
    )
