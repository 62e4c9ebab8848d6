"""Runs batches: each line of a file goes through the very handler that would answer it over HTTP, at background priority."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

import msgspec

from sagellm_gateway.context import Message, Principal
from sagellm_gateway.errors import HttpError
from sagellm_gateway.ids import new_id
from sagellm_gateway.jsonbody import decode_object
from sagellm_protocol.errors import InvalidArgumentError
from sagellm_protocol.generation import Priority

if TYPE_CHECKING:
    from sagellm_gateway.context import Gateway
    from sagellm_gateway.routing import Router

__all__ = ["ENDPOINTS", "BatchRunner"]

log = logging.getLogger("sagellm_gateway")

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MAX_LINES = 50_000
_AT_ONCE = 16
_RETRIES = 6


class _Line(msgspec.Struct, kw_only=True):
    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


class BatchRunner:
    """The batches of one gateway that are under way."""

    def __init__(self, gateway: Gateway, router: Router) -> None:
        self._gateway = gateway
        self._router = router
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._at_once = asyncio.Semaphore(_AT_ONCE)

    async def resume(self) -> None:
        """Go on with what an earlier process left under way."""
        for owner, batch in await self._gateway.batches.unfinished():
            if batch["status"] == "cancelling":
                await self._finish(owner, batch, "cancelled")
            else:
                self.start(owner, batch)

    def start(self, owner: str, batch: dict[str, Any]) -> None:
        """Begin, or go on with, a batch."""
        task = asyncio.create_task(self._run(owner, batch))
        self._tasks[batch["id"]] = task
        task.add_done_callback(lambda _: self._tasks.pop(batch["id"], None))

    async def cancel(self, owner: str, batch: dict[str, Any]) -> dict[str, Any]:
        """Stop a batch; the lines that are done keep their results."""
        task = self._tasks.get(batch["id"])
        if task is None:
            return batch
        task.cancel()
        await asyncio.wait([task])
        current = await self._gateway.batches.get(owner, batch["id"]) or batch
        if current["status"] in ("validating", "in_progress", "finalizing"):
            current["cancelling_at"] = int(time.time())
            await self._finish(owner, current, "cancelled")
        return current

    async def stop(self) -> None:
        """Stop all work (shutdown); `resume` goes on with it."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, owner: str, batch: dict[str, Any]) -> None:
        try:
            await self._work(owner, batch)
        except asyncio.CancelledError:
            raise
        except Exception:  # a task's border: the batch fails, the log has the rest
            log.exception("batch %s failed", batch["id"])
            batch["errors"] = _errors([("internal_error", None, "the server failed on this batch")])
            await self._finish(owner, batch, "failed")

    async def _work(self, owner: str, batch: dict[str, Any]) -> None:
        store = self._gateway.batches
        content = await self._gateway.files.content(owner, batch["input_file_id"])
        if content is None:
            batch["errors"] = _errors([("file_not_found", None, "the input file is gone")])
            await self._finish(owner, batch, "failed")
            return
        lines, problems = await asyncio.to_thread(
            _parse, content, batch["endpoint"], self._gateway.config.limits.json_depth
        )
        if problems:
            batch["errors"] = _errors(problems)
            await self._finish(owner, batch, "failed")
            return
        done = await store.done_lines(batch["id"])
        counts = batch["request_counts"]
        counts.update(total=len(lines), failed=sum(done.values()), completed=len(done) - sum(done.values()))
        batch["status"] = "in_progress"
        batch["in_progress_at"] = batch["in_progress_at"] or int(time.time())
        await store.put(owner, batch)
        pending: set[asyncio.Task[None]] = set()
        try:
            for number, line in enumerate(lines):
                if number in done:
                    continue
                await self._at_once.acquire()
                task = asyncio.create_task(self._line(owner, batch, number, line))
                pending.add(task)
                task.add_done_callback(pending.discard)
                task.add_done_callback(lambda _: self._at_once.release())
            if pending:
                await asyncio.gather(*pending)
        finally:
            for task in list(pending):
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        await self._finish(owner, batch, "completed")

    async def _line(self, owner: str, batch: dict[str, Any], number: int, line: _Line) -> None:
        status, request_id, body = await self._ask(owner, line)
        failed = status >= 400
        response = {
            "status_code": status,
            "request_id": request_id,
            "body": msgspec.json.decode(body) if body else None,
        }
        row = {
            "id": new_id("batch_req_"),
            "custom_id": line.custom_id,
            "response": response,
            "error": None,
        }
        await self._gateway.batches.add_result(batch["id"], number, failed=failed, body=msgspec.json.encode(row))
        batch["request_counts"]["failed" if failed else "completed"] += 1
        await self._gateway.batches.put(owner, batch)

    async def _ask(self, owner: str, line: _Line) -> tuple[int, str, bytes]:
        """Ask our own router; an engine that is away or busy is asked again, with growing pauses."""
        for attempt in range(_RETRIES):
            status, request_id, body = await self._call(owner, line)
            if status not in (429, 503) or attempt == _RETRIES - 1:
                break
            await asyncio.sleep(min(30.0, 0.25 * 4**attempt))
        return status, request_id, body

    async def _call(self, owner: str, line: _Line) -> tuple[int, str, bytes]:
        request_id = new_id("req_")
        scope: dict[str, Any] = {
            "type": "http",
            "method": "POST",
            "path": line.url,
            "headers": [(b"content-type", b"application/json")],
            "query_string": b"",
            "sagellm.request_id": request_id,
            "sagellm.principal": Principal(key_id=owner),
            "sagellm.priority": Priority.BACKGROUND,
        }
        sent: list[Message] = [{"type": "http.request", "body": msgspec.json.encode(line.body), "more_body": False}]
        status, parts = 500, []

        async def receive() -> Message:
            if sent:
                return sent.pop()
            # Nobody hangs up here: cancelling the batch cancels this task.
            await asyncio.get_running_loop().create_future()
            raise AssertionError

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                parts.append(message.get("body", b""))

        await self._router(scope, receive, send)
        tokens = scope.get("sagellm.tokens")
        if tokens is not None and owner:
            self._gateway.keyring.used(scope["sagellm.principal"], scope.get("sagellm.model", ""), *tokens)
        return status, request_id, b"".join(parts)

    async def _finish(self, owner: str, batch: dict[str, Any], status: str) -> None:
        now = int(time.time())
        store = self._gateway.batches
        for failed, field in ((False, "output_file_id"), (True, "error_file_id")):
            content = await store.results(batch["id"], failed=failed)
            if content and batch[field] is None:
                name = f"{batch['id']}_{'error' if failed else 'output'}.jsonl"
                made = await self._gateway.files.add(owner, name, "batch_output", content)
                batch[field] = made.id
        batch["status"] = status
        batch[f"{status}_at"] = now
        if status == "completed":
            batch["finalizing_at"] = now
        await store.put(owner, batch)


def _errors(problems: list[tuple[str, int | None, str]]) -> dict[str, Any]:
    data = [{"code": code, "line": line, "message": message, "param": None} for code, line, message in problems[:100]]
    return {"object": "list", "data": data}


def _parse(content: bytes, endpoint: str, depth: int) -> tuple[list[_Line], list[tuple[str, int | None, str]]]:
    lines: list[_Line] = []
    problems: list[tuple[str, int | None, str]] = []
    seen: set[str] = set()
    for number, raw in enumerate(content.splitlines(), 1):
        if not raw.strip():
            continue
        if len(lines) >= MAX_LINES:
            problems.append(("too_many_lines", number, f"the file has more than {MAX_LINES} requests"))
            break
        try:
            line = msgspec.convert(decode_object(raw, depth), _Line)
        except (HttpError, InvalidArgumentError, msgspec.ValidationError) as error:
            problems.append(("invalid_json_line", number, str(error)))
            continue
        problem = _problem(line, endpoint, seen)
        if problem is not None:
            problems.append((problem[0], number, problem[1]))
            continue
        seen.add(line.custom_id)
        lines.append(line)
    if not lines and not problems:
        problems.append(("empty_file", None, "the file has no request"))
    return lines, problems


def _problem(line: _Line, endpoint: str, seen: set[str]) -> tuple[str, str] | None:
    if line.custom_id in seen:
        return "duplicate_custom_id", f"custom_id {line.custom_id[:64]!r} stands there twice"
    if line.method != "POST":
        return "invalid_method", "method must be POST"
    if line.url != endpoint:
        return "invalid_url", f"url must be {endpoint}, the endpoint of the batch"
    if line.body.get("stream") or line.body.get("background"):
        return "invalid_request", "stream and background have no place in a batch"
    return None
