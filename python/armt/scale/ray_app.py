"""A Ray Serve application: sessions over HTTP, computed by any of several replicas (extra "ray").

An ingress sends every request to a replica that holds the session already, if there is one; Serve
keeps account of that. Nothing but speed depends on it: states lie in a shared store, and a replica
reads the newest one before it answers. If a replica dies its requests go to another one, under the
same request id, so that none is done twice.
"""

import asyncio
import os
import secrets
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from fastapi import FastAPI, Header, Response
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from armt.engine import Engine
from armt.errors import InvalidArgument, StateError
from armt.scale.store import SessionMissing, StateStore, VersionConflict
from armt.scale.worker import Answer, Held, Worker
from armt.session import Session

PATIENCE = 120.0
"""Seconds for which a request is sent again when replicas die."""
PAUSE = 0.1
MOST_WAITING = 1024
"""Requests that wait for a replica; more are refused."""
MOST_TOKENS = 65536
"""Tokens of one generation."""


class Feed(BaseModel):
    """Token ids to read."""

    model_config = ConfigDict(extra="forbid")
    tokens: list[int] = Field(min_length=1)
    if_version: int | None = None


class Generate(BaseModel):
    """Token ids to read first, and how to go on from there."""

    model_config = ConfigDict(extra="forbid")
    tokens: list[int] = []
    max_new_tokens: int = Field(default=20, ge=0, le=MOST_TOKENS)
    temperature: float = Field(default=0.0, ge=0)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=2**64)
    stop_ids: list[int] = []
    write: bool = False
    if_version: int | None = None


class Replica:
    """One engine. All that it keeps between requests are copies of what the store holds."""

    def __init__(self, model: str, store: StateStore, dtype: Any, threads: int) -> None:
        engine = Engine.from_pretrained(model, dtype=dtype, threads=threads)
        self._worker = Worker(engine, store)

    async def _hold(self, session_id: str) -> Held:
        """What Serve counts as held by this replica, until others push it out."""
        return Held(session_id)

    async def run(self, what: str, session_id: str, request: str, body: dict[str, Any]) -> Answer:
        """The answer, with the HTTP status under "status"."""
        held: Held = await self._hold(session_id)
        call = partial(_OPERATIONS[what], self._worker, held, request, body)
        try:
            answer = await asyncio.to_thread(call)
        except (ValueError, MemoryError, OSError) as error:
            return _problem(error)
        return answer | {"status": 200, "process": os.getpid()}


def _create(worker: Worker, held: Held, request: str, body: dict[str, Any]) -> Answer:
    worker.create(held.id)
    return worker.look(held)


def _look(worker: Worker, held: Held, request: str, body: dict[str, Any]) -> Answer:
    return worker.look(held)


def _delete(worker: Worker, held: Held, request: str, body: dict[str, Any]) -> Answer:
    return {"deleted": worker.delete(held.id)}


def _feed(worker: Worker, held: Held, request: str, body: dict[str, Any]) -> Answer:
    def work(session: Session) -> Answer:
        session.feed(body["tokens"])
        return {}

    return worker.change(held, request, work, if_version=body["if_version"])


def _generate(worker: Worker, held: Held, request: str, body: dict[str, Any]) -> Answer:
    def work(session: Session) -> Answer:
        if body["tokens"]:
            session.feed(body["tokens"])
        names = ("temperature", "top_k", "top_p", "seed", "stop_ids")
        settings = {name: body[name] for name in names}
        return {"output": list(session.generate(body["max_new_tokens"], **settings))}

    if body["write"]:
        return worker.change(held, request, work, if_version=body["if_version"])
    return worker.ask(held, work)


_OPERATIONS: dict[str, Callable[[Worker, Held, str, dict[str, Any]], Answer]] = {
    "create": _create,
    "look": _look,
    "delete": _delete,
    "feed": _feed,
    "generate": _generate,
}


def _problem(error: Exception) -> Answer:
    """An error as an answer: a status and a stable code."""
    for kind, status, code in (
        (SessionMissing, 404, "session_not_found"),
        (VersionConflict, 409, "version_mismatch"),
        (InvalidArgument, 400, "invalid_request"),
        (StateError, 500, "session_lost"),
        (MemoryError, 503, "out_of_memory"),
        (OSError, 503, "store_unavailable"),
        (ValueError, 400, "invalid_request"),
    ):
        if isinstance(error, kind):
            return {"status": status, "error": {"code": code, "message": str(error)}}
    raise error


class Ingress:
    """Finds a replica for each request, and another one if that dies."""

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas

    async def send(
        self, what: str, session_id: str, request: str, body: dict[str, Any], response: Response
    ) -> Answer:
        """One request, done once whatever happens to replicas."""
        handle = self._replicas.options(multiplexed_model_id=session_id)
        end = time.monotonic() + PATIENCE
        while True:
            try:
                answer: Answer = await handle.run.remote(what, session_id, request, body)
                break
            except RayActorError:
                if time.monotonic() > end:
                    message = f"replicas died for {PATIENCE:g} s; try later with the same key"
                    answer = {"status": 503, "error": {"code": "unavailable", "message": message}}
                    break
                await asyncio.sleep(PAUSE)
            except BackPressureError:
                message = "too many requests wait already; try later"
                answer = {"status": 503, "error": {"code": "overloaded", "message": message}}
                break
        response.status_code = answer.pop("status")
        return answer


api = FastAPI(title="armt", docs_url=None, redoc_url=None)
RequestKey = Annotated[str, Header(alias="Idempotency-Key", max_length=256)]


def _unique(key: str) -> str:
    return key or secrets.token_hex(16)


@serve.ingress(api)  # carries along what is defined above it
class Routes(Ingress):
    """What there is over HTTP."""

    @api.post("/v1/sessions")
    async def create(self, response: Response) -> Answer:
        """A new empty session under an opaque id."""
        session_id = f"sess_{secrets.token_hex(16)}"
        return {"id": session_id} | await self.send("create", session_id, "", {}, response)

    @api.get("/v1/sessions/{session_id}")
    async def look(self, session_id: str, response: Response) -> Answer:
        """Version and sizes."""
        return await self.send("look", session_id, "", {}, response)

    @api.delete("/v1/sessions/{session_id}")
    async def delete(self, session_id: str, response: Response) -> Answer:
        """Forgets the session."""
        return await self.send("delete", session_id, "", {}, response)

    @api.post("/v1/sessions/{session_id}/feed")
    async def feed(
        self, session_id: str, body: Feed, response: Response, key: RequestKey = ""
    ) -> Answer:
        """Reads tokens into the session."""
        return await self.send("feed", session_id, _unique(key), body.model_dump(), response)

    @api.post("/v1/sessions/{session_id}/generate")
    async def generate(
        self, session_id: str, body: Generate, response: Response, key: RequestKey = ""
    ) -> Answer:
        """Goes on from the session; it is changed only where ``write`` is set."""
        return await self.send("generate", session_id, _unique(key), body.model_dump(), response)


def application(
    model: str,
    store: StateStore,
    *,
    replicas: int = 2,
    dtype: str = "auto",
    threads: int = 0,
    live_sessions: int = 256,
    requests: int = 64,
    cpus: float = 1.0,
    gpus: float = 0.0,
) -> serve.Application:
    """What ``serve.run`` takes: ``replicas`` engines of ``model`` over ``store``.

    ``store`` goes to every replica by pickle. ``live_sessions`` are held ready in each replica, and
    up to ``requests`` run in it at the same time, on ``threads`` CPU threads (0: all cores) and the
    ``cpus`` and ``gpus`` that Ray gives it.
    """
    if replicas < 1:
        raise InvalidArgument(f"replicas: found {replicas}, expected 1 or more")

    class Engines(Replica):
        _hold = serve.multiplexed(max_num_models_per_replica=live_sessions)(Replica._hold)

    engines = serve.deployment(
        name="engine",
        num_replicas=replicas,
        max_ongoing_requests=requests,
        max_queued_requests=MOST_WAITING,
        health_check_period_s=2,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    )(Engines)
    ingress = serve.deployment(name="ingress", max_ongoing_requests=1024)(Routes)
    return ingress.bind(engines.bind(model, store, dtype, threads))
