"""The server for programs: `/v1/embeddings` as OpenAI's API has it, `/search`, `/health` and `/metrics`."""

import asyncio
import base64
from array import array
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any, Literal

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from retrieval.server.errors import LimitedBody, RequestError, add_handlers
from retrieval.server.limits import Limits
from retrieval.server.metrics import Counted
from retrieval.server.service import Service

INPUTS = "input: give a text, a list of texts, token ids, or a list of lists of token ids"


class EmbeddingsRequest(BaseModel):
    """A request for embeddings."""

    model_config = ConfigDict(extra="forbid", strict=True)

    input: str | list[Any]  # a text, texts, token ids, or lists of token ids
    model: str
    dimensions: int | None = Field(None, ge=1)
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None  # whom the request is for; OpenAI's clients may send it, and nothing depends on it
    prompt_name: str | None = None


class SearchRequest(BaseModel):
    """A request for documents."""

    model_config = ConfigDict(extra="forbid", strict=True)

    query: str
    k: int = Field(10, ge=1, le=1000)
    passages: int = Field(3, ge=0, le=100)
    candidates: int = Field(100, ge=1, le=10_000)
    weight: float | None = Field(None, ge=0, le=1)
    parts: list[str] | None = None
    filters: dict[str, Any] | None = None


def make_app(service: Service, limits: Limits | None = None) -> FastAPI:
    """Make the application.

    Args:
        service: what computes; it is closed when the application is shut down.
        limits: what a request may ask for.

    Returns:
        The application, without the page.
    """
    limits = limits or Limits()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(service.close)

    # Their pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="longembed", lifespan=lifespan, docs_url=None, redoc_url=None)
    add_handlers(app, str(service.index.folder))
    app.add_middleware(LimitedBody, most=int(limits.max_request_mb * 2**20))
    app.add_middleware(Counted, metrics=service.metrics)

    async def results(futures: Sequence["Future[Any]"]) -> list[Any]:
        try:
            return await asyncio.wait_for(asyncio.gather(*map(asyncio.wrap_future, futures)), limits.timeout)
        except BaseException as error:  # also where one text of a request has failed, or the server is shutting down
            service.worker.cancel(futures)
            if isinstance(error, asyncio.TimeoutError):
                raise RequestError(f"no answer after {limits.timeout:g} seconds; try again later", 503) from None
            raise

    def rows_of(request: EmbeddingsRequest) -> list[array]:
        """Return the token ids of each input; token ids are read as they are given."""
        given = request.input if isinstance(request.input, list) else [request.input]
        if given and all(type(id) is int for id in given):
            given = [given]
        if not 1 <= len(given) <= limits.max_inputs:
            raise RequestError(f"input: give 1 to {limits.max_inputs:,} texts at a time", 400, "input")
        if all(isinstance(text, str) for text in given):
            try:
                return service.tokenize(given, request.prompt_name)
            except ValueError as error:
                raise RequestError(str(error).removeprefix("encode: "), 400, "input") from None
        if request.prompt_name is not None:
            raise RequestError("prompt_name is for texts; put the prompt into the token ids", 400, "prompt_name")
        limit, vocabulary = service.model.config.max_position_embeddings, service.model.config.vocab_size
        for number, ids in enumerate(given):
            if not isinstance(ids, list) or not all(type(id) is int for id in ids):
                raise RequestError(INPUTS, 400, "input")
            if not 1 <= len(ids) <= limit:
                raise RequestError(f"input {number} has {len(ids):,} token ids; give 1 to {limit:,}", 400, "input")
            if not 0 <= min(ids) <= max(ids) < vocabulary:
                raise RequestError(
                    f"input {number}: token ids of this model are from 0 to {vocabulary - 1:,}; give texts if "
                    "these are of another tokenizer",
                    400,
                    "input",
                )
        return [array("i", ids) for ids in given]

    @app.post("/v1/embeddings")
    async def embeddings(request: EmbeddingsRequest) -> Response:
        if request.model != service.name:
            raise RequestError(f"there is no model {request.model!r} here; ask for {service.name!r}", 404, "model")
        width = service.model.config.hidden_size
        if request.dimensions is not None and request.dimensions > width:
            raise RequestError(f"dimensions: the model has {width}, not {request.dimensions}", 400, "dimensions")
        rows = await run_in_threadpool(rows_of, request)
        tokens = sum(map(len, rows))
        if tokens > service.worker.queue_tokens:
            raise RequestError(
                f"the request has {tokens:,} tokens, and {service.worker.queue_tokens:,} can wait; divide it",
                400,
                "input",
            )
        vectors = await results(service.embed(rows))

        def answer() -> JSONResponse:
            found = service.finish(vectors, request.dimensions).numpy()
            if request.encoding_format == "base64":
                embeddings: list[Any] = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in found]
            else:
                embeddings = found.tolist()
            data = [{"object": "embedding", "index": place, "embedding": one} for place, one in enumerate(embeddings)]
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            return JSONResponse({"object": "list", "data": data, "model": service.name, "usage": usage})

        # Numbers to text takes a while: other requests are read meanwhile.
        return await run_in_threadpool(answer)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": service.name, "object": "model", "owned_by": "longembed"}]}

    @app.post("/search")
    async def search(request: SearchRequest) -> Response:
        (hits,) = await results([service.search(**request.model_dump())])
        return JSONResponse({"hits": [asdict(hit) for hit in hits]})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        if not service.worker.is_alive:
            raise RequestError("the worker has ended; start the server again", 503)
        return {"status": "ok", "model": service.name, "documents": len(service.index)}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app
