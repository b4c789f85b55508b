"""``armt serve``: the HTTP server."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armt.cli.options import Device, DType, Model, Threads

if TYPE_CHECKING:
    import armt
    from armt.server import Settings


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    model_name: Annotated[
        str, typer.Option(metavar="NAME", help="Its id for clients. [default: the folder's name]")
    ] = "",
    api_keys_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="One key a line; each sees only its own sessions."),
    ] = None,
    session_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where idle sessions lie, also after a restart."),
    ] = None,
    max_sessions: Annotated[
        int, typer.Option(min=1, metavar="N", help="In memory and on disk.")
    ] = 20_000,
    max_live_sessions: Annotated[int, typer.Option(min=1, metavar="N", help="In memory.")] = 256,
    max_requests: Annotated[int, typer.Option(min=1, metavar="N", help="At the same time.")] = 256,
    max_batch: Annotated[int, typer.Option(min=1, metavar="N", help="Sessions in one pass.")] = 128,
    max_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer.")] = 4096,
    max_body_mib: Annotated[int, typer.Option(min=1, metavar="N", help="Largest JSON body.")] = 8,
    max_feed_mib: Annotated[
        int, typer.Option(min=0, metavar="N", help="Largest feed; 0: any size.")
    ] = 0,
    idle_seconds: Annotated[
        float, typer.Option(min=0.1, help="Unused sessions go to disk after this.")
    ] = 300.0,
    session_ttl: Annotated[
        float, typer.Option(min=0.0, help="Unused sessions are deleted after this; 0: never.")
    ] = 0.0,
    request_timeout: Annotated[float, typer.Option(min=0.1, help="Longest time.")] = 600.0,
    shutdown_timeout: Annotated[
        float, typer.Option(min=1.0, help="For running requests at the end.")
    ] = 30.0,
    json_logs: Annotated[bool, typer.Option("--json-logs", help="One object a line.")] = False,
    log_requests: Annotated[bool, typer.Option(help="A line for each request.")] = True,
    device: Device = "auto",
    dtype: DType = "auto",
    threads: Threads = 0,
) -> None:
    """Serves a model over HTTP: OpenAI and llama.cpp clients, sessions, metrics, and a page at /.

    Needs the extra "server" (pip install "armt[server]"). Ctrl-C or SIGTERM lets running requests
    finish and saves all sessions to --session-dir.

    Example:

    \b
      armt serve demo
      armt serve MODEL --host 0.0.0.0 --api-keys-file keys.txt --session-dir sessions
    """
    running = _import()
    from armt.cli.options import load_engine
    from armt.server import Settings, create_app, logs
    from armt.server.auth import read_keys

    settings = Settings(
        model_name=model_name,
        api_keys=() if api_keys_file is None else read_keys(api_keys_file),
        session_dir=session_dir,
        max_sessions=max_sessions,
        max_sessions_per_key=max_sessions,
        max_live_sessions=max_live_sessions,
        max_requests=max_requests,
        max_requests_per_key=max(max_requests // 2, 1),
        max_batch=max_batch,
        max_tokens=max_tokens,
        max_body_bytes=max_body_mib << 20,
        max_feed_bytes=max_feed_mib << 20,
        idle_seconds=idle_seconds,
        session_ttl=session_ttl,
        request_timeout=request_timeout,
        shutdown_timeout=shutdown_timeout,
    )
    logs.set_up(as_json=json_logs, requests=log_requests)
    listener = running.bind(host, port)
    engine = load_engine(model, device=device, dtype=dtype, threads=threads)
    app = create_app(engine, settings)
    app.state.context.store.open()  # what is wrong with the folder is said before anything runs
    name, bound = app.state.context.model.name, listener.getsockname()[1]
    server = running.server_of(
        app, settings, ready=lambda: _announce(engine, settings, name, host, bound)
    )
    server.serve_until_told(listener)


def _import() -> Any:
    try:
        from armt.server import running
    except ImportError as error:
        raise ValueError(
            f'the server needs the package "{error.name}", which is not installed: '
            'run pip install "armt[server]"'
        ) from error
    return running


def _announce(engine: armt.Engine, settings: Settings, name: str, host: str, port: int) -> None:
    """One line that says what is served where, and one for each thing to think of."""
    import logging

    from armt.cli.options import where

    shown = f"[{host}]" if ":" in host else host
    log = logging.getLogger("armt.server")
    fields = {
        "model": name,
        "url": f"http://{shown}:{port}/",
        "device": where(engine),
        "keys": len(settings.api_keys),
        "session_dir": str(settings.session_dir or "temporary"),
    }
    log.info("serving", extra={"fields": fields})
    if not settings.api_keys and not _is_local(host):
        log.warning("there are no API keys: everybody who reaches this address may use the server")


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
