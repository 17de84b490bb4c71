"""The page: a box for a question, what was found, and a way to search text files of one's own.

Nothing is loaded from elsewhere. Files are read by the browser and sent as text: Gradio's own way keeps them in a
folder and takes a path from the browser.
"""

import os
from concurrent.futures import TimeoutError
from typing import Any

from fastapi import FastAPI

from common.errors import UserError
from retrieval.server.errors import error_response
from retrieval.server.own_files import NO_FILES, SUFFIXES
from retrieval.server.service import Service
from retrieval.server.view import message, page_of
from retrieval.server.worker import BusyError

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported and whenever a page is made
import gradio as gr

# Characters of a question.
MAX_QUERY = 100_000
# Searches that wait for each other; one more is refused.
MAX_WAITING = 64
# Where is searched.
SERVED, OWN = "the index", "my files"
# What the page asks Gradio for. Its other addresses give out and take files, or run other things.
GRADIO = "/gradio_api/"
ALLOWED = tuple(GRADIO + name for name in ("queue/", "heartbeat/", "startup-events", "info", "reset", "cancel"))
# Ask for files, and return their names and contents as text; what is too large is not read, and refused by its size.
CHOOSE = """async () => {
    const input = Object.assign(document.createElement("input"), {type: "file", multiple: true, accept: "%s"});
    input.style.display = "none";
    document.body.append(input);
    const files = await new Promise((resolve) => {
        input.onchange = () => resolve([...input.files]);
        input.oncancel = () => resolve([]);
        input.click();
    });
    input.remove();
    const read = (file) => new Promise((resolve, reject) => {
        const reader = new FileReader();
        reader.onload = () => resolve([file.name, reader.result.slice(reader.result.indexOf(",") + 1)]);
        reader.onerror = () => reject(reader.error);
        reader.readAsDataURL(file);
    });
    if (files.reduce((sum, file) => sum + file.size, 0) > %d) return ["%s"];
    return [JSON.stringify(await Promise.all(files.map(read)))];
}"""
TOO_LARGE = "too large"


class Page(gr.Blocks):
    """Gradio's page, but for texts and numbers alone, in whose place Gradio would take a file or an address."""

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        """Refuse what is neither.

        Args:
            block_fn: what is called.
            inputs: what it is called with, as it was sent.
        """
        if not all(isinstance(value, str | int | float) for value in inputs):
            raise gr.Error("this page takes texts and numbers")
        super().validate_inputs(block_fn, inputs)


def make_page(service: Service, timeout: float = 60.0) -> gr.Blocks:
    """Make the page.

    Args:
        service: what searches.
        timeout: seconds after which a search is given up.
    """
    own_files = service.own_files
    largest = f"{own_files.limits.own_mb:g} MiB"

    def search(query: str, k: float, where: str, request: gr.Request) -> str:
        if len(query) > MAX_QUERY:
            return message(f"The question has more than {MAX_QUERY:,} characters; ask a shorter one.")
        own = own_files.index(request.session_hash) if where == OWN else None
        if where == OWN and own is None:
            return message("Your files are not here any more; choose them again.")
        try:
            future = service.look(query, min(50, max(1, int(k))), own)
        except BusyError as error:
            return message(f"The server is busy: {error}.")
        try:
            return page_of(future.result(timeout))
        except TimeoutError:
            service.worker.cancel([future])
            return message(f"There was no answer after {timeout:g} seconds; try again later.")
        except UserError as error:
            return message(str(error).replace(str(service.index.folder), "the index"))

    # The last of what it returns empties the box, which Gradio would keep with the session.
    def read(sent: str, request: gr.Request, progress: gr.Progress = gr.Progress()) -> tuple[Any, Any, str]:  # noqa: B008
        session = request.session_hash
        try:
            if sent == TOO_LARGE:
                raise UserError(f"the files have more than {largest} together; choose fewer")
            progress(0.0, desc="Reading your files")
            own = own_files.build(session, sent, lambda part: progress(part, desc="Reading your files"))
        except UserError as error:
            if str(error) == NO_FILES:
                return gr.skip(), gr.skip(), ""
            shown = gr.skip() if own_files.index(session) is not None else gr.update(value=SERVED, visible=False)
            return message(f"Your files were not read: {error}."), shown, ""
        told = f"Searched now: {', '.join(own.names)}. They are removed when you close this page."
        told += "".join(f" {one}." for one in own.skipped)
        return message(told), gr.update(value=OWN, visible=True), ""

    def forget(request: gr.Request) -> None:
        own_files.remove(request.session_hash)

    with Page(title="longembed", analytics_enabled=False) as page:
        gr.Markdown(f"# Search {len(service.index):,} documents")
        query = gr.Textbox(label="Question", max_length=MAX_QUERY, autofocus=True)
        k = gr.Slider(1, 50, 10, step=1, label="Documents")
        where = gr.Radio([SERVED, OWN], value=SERVED, label="Search in", visible=False)
        with gr.Row():
            button = gr.Button("Search", variant="primary")
            choose = gr.Button(f"Search text files of your own (up to {largest})", visible=own_files.most_bytes > 0)
        told, answer = gr.HTML(), gr.HTML()
        sent = gr.Textbox(visible=False)
        asked = [query.submit, button.click]
        gr.on(asked, search, [query, k, where], answer, api_visibility="private", concurrency_limit=8)
        choose.click(
            read,
            sent,
            [told, where, sent],
            js=CHOOSE % (",".join(SUFFIXES), own_files.most_bytes, TOO_LARGE),
            api_visibility="private",
            concurrency_limit=1,
            show_progress_on=told,
        )
        page.unload(forget)
    page.queue(max_size=MAX_WAITING)
    return page


def look() -> dict[str, Any]:
    """Return how the page looks: with the fonts of the system, since those of the themes come from elsewhere."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return {"theme": theme, "footer_links": []}


class WithoutFiles:
    """An application without what Gradio answers at addresses that the page does not ask for.

    Args:
        app: the application.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve a request as ASGI has it."""
        path = scope.get("path", "")
        if scope["type"] == "http" and path.startswith(GRADIO) and not path.startswith(ALLOWED):
            await error_response("there is nothing at this address", 404)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def mount_page(app: FastAPI, page: gr.Blocks) -> FastAPI:
    """Make an application serve the page at all paths that it has no other answer for.

    Args:
        app: the server for programs.
        page: the page.

    Returns:
        The application with the page.
    """
    app.add_middleware(WithoutFiles)
    return gr.mount_gradio_app(
        app, page, path="/", **look(), run_history=False, ssr_mode=False, show_error=False, max_file_size=1
    )
