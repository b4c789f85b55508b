"""Health, metrics, models, and the page."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, JSONResponse, Response

import armt
from armt.server.context import Asking
from armt.server.errors import ApiError

router = APIRouter()

PAGE = files("armt.server").joinpath("page.html").read_text(encoding="utf-8")
# One file without outside resources; nothing else may be loaded or framed.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@router.get("/", tags=["Page"], response_class=HTMLResponse)
async def page() -> HTMLResponse:
    """A page that shows what the memory is doing."""
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY})


@router.get("/health", tags=["Operation"], response_model=None)
async def health(asking: Asking) -> Response:
    """200 while the engine runs, 503 otherwise."""
    context = asking.context
    alive = context.scheduler.alive
    body = {
        "status": "ok" if alive else "stopped",
        "version": armt.__version__,
        "model": context.model.name,
        "device": context.model.engine.device,
    }
    return JSONResponse(body, status_code=200 if alive else 503)


@router.get("/metrics", tags=["Operation"], response_model=None)
async def metrics(asking: Asking) -> Response:
    """For Prometheus."""
    return Response(asking.context.metrics.text(), media_type="text/plain; version=0.0.4")


@router.get("/v1/models", tags=["OpenAI"], response_model=None)
async def models(asking: Asking) -> dict[str, Any]:
    """The one model that is served."""
    return {"object": "list", "data": [shown(asking)]}


@router.get("/v1/models/{model:path}", tags=["OpenAI"], response_model=None)
async def model(model: str, asking: Asking) -> dict[str, Any]:
    """The model by its id."""
    if model != asking.context.model.name:
        raise ApiError("model_not_found", "there is no such model", param="model")
    return shown(asking)


def shown(asking: Asking) -> dict[str, Any]:
    """The model as JSON."""
    served = asking.context.model
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "armt",
        "segment_size": served.engine.segment_size,
        "vocab_size": served.engine.vocab_size,
        "text": served.tokenizer is not None,
        "chat_template": served.chat is not None,
    }
