"""Settings of a gateway, grouped in small value objects."""

from __future__ import annotations

import msgspec

__all__ = ["GatewayConfig", "Limits", "Origins", "Timeouts"]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on what one client may send or hold.

    Attributes:
        body_bytes: of a request body, counted while it streams.
        json_depth: nesting of objects and arrays.
        header_bytes: request line and header lines together.
        headers: number of header lines.
        key_bytes: length of an API key.
        choices: completions of one request, over all its prompts.
        stop_strings: of one request.
        schema_bytes: JSON text of a grammar, or of one tool's parameters.
        pattern_chars: length of one regular expression in a schema.
        queued_frames: output frames that wait for a slow reader before it is dropped.
        in_flight: requests that run or wait at the same time; more are answered 429.
        file_bytes: of one uploaded file.
        stored_bytes: of all files of one key.
        sessions: of one key; the least recently used go first.
    """

    body_bytes: int = 32 * 1024 * 1024
    json_depth: int = 64
    header_bytes: int = 32 * 1024
    headers: int = 100
    key_bytes: int = 512
    choices: int = 128
    stop_strings: int = 64
    schema_bytes: int = 256 * 1024
    pattern_chars: int = 1024
    queued_frames: int = 8192
    in_flight: int = 4096
    file_bytes: int = 128 * 1024 * 1024
    stored_bytes: int = 4 * 1024 * 1024 * 1024
    sessions: int = 10_000


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds.

    Attributes:
        header: from the first byte (or the accept) to the end of the header block.
        body: for the whole request body.
        first_ping: until a stream without an event is answered with headers and a keep-alive comment.
        ping: between keep-alive comments.
        write: for which a reader may take nothing before it is dropped.
        keep_alive: for which an idle connection is kept.
        grace: for running work after SIGTERM.
    """

    header: float = 10.0
    body: float = 30.0
    first_ping: float = 1.0
    ping: float = 15.0
    write: float = 30.0
    keep_alive: float = 75.0
    grace: float = 30.0


class Origins(msgspec.Struct, frozen=True, kw_only=True):
    """Which names and web origins may talk to the gateway.

    IP addresses and ``localhost`` are always good in ``Host``: DNS rebinding needs a name.

    Attributes:
        hosts: further names that ``Host`` may hold; ``*`` allows any.
        cors: web origins (``https://chat.example``) that a browser may call from; ``*`` allows any, without credentials.
    """

    hosts: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()


class GatewayConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All settings of `sagellm_gateway.server.create_app`.

    Attributes:
        host: address to listen on.
        port: port to listen on; 0 lets the system choose.
        state_path: SQLite file for keys, sessions, stored responses, files and batches; None keeps them in memory.
        require_key: demand an API key on every route but /live, /health and /ready. None: when the key store holds any.
        access_log: write one line a request to the logger ``sagellm_gateway.access``.
        tracing: make OpenTelemetry spans (extra ``otel``).
        limits: bounds.
        timeouts: seconds.
        origins: names and web origins.
        response_ttl_s: for which a stored response can be fetched.
        response_limit: stored responses; the least recently used go first.
        session_ttl_s: for which an idle session is kept.
    """

    host: str = "127.0.0.1"
    port: int = 8889
    state_path: str | None = None
    require_key: bool | None = None
    access_log: bool = True
    tracing: bool = False
    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    origins: Origins = Origins()
    response_ttl_s: float = 30 * 24 * 3600.0
    response_limit: int = 10_000
    session_ttl_s: float = 7 * 24 * 3600.0
