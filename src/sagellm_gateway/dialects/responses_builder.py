"""The response object of the Responses API as it grows, and the events that describe how.

Objects and events follow the Open Responses specification (see docs/design/0070-dialects.md).
"""

from __future__ import annotations

from typing import Any

import msgspec

from sagellm_gateway.dialects.openai_common import encode_json, token_logprob_json
from sagellm_gateway.dialects.openai_responses import ITEM_PREFIX, FormatWire, ResponsesBody, wants_logprobs
from sagellm_gateway.errors import openai_body
from sagellm_protocol.errors import SageError
from sagellm_protocol.generation import (
    ChoiceDelta,
    GenerationEnd,
    GenerationRequest,
    GenerationStart,
    TokenLogprob,
    Usage,
)

__all__ = ["ResponseBuilder", "event_bytes"]


def event_bytes(event: dict[str, Any]) -> bytes:
    """Return one event of the stream as bytes."""
    return f"event: {event['type']}\ndata: ".encode() + encode_json(event) + b"\n\n"


class ResponseBuilder:
    """The response object as it grows. Each method returns the events that describe what happened.

    Args:
        body: the request.
        request: what it became; its id is the response's.
        created: unix seconds.
    """

    def __init__(self, body: ResponsesBody, request: GenerationRequest, created: int) -> None:
        self.response = _resource(body, request, created)
        self.sequence = 0
        self._logprobs = wants_logprobs(body)
        self._item: dict[str, Any] | None = None
        self._key: tuple[str, int] = ("", 0)
        self._parts: list[str] = []
        self._entries: list[dict[str, Any]] = []
        self._finish: str | None = None

    # -- events ----------------------------------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        event = {"type": kind, "sequence_number": self.sequence, **fields}
        self.sequence += 1
        return event

    def _snapshot(self) -> dict[str, Any]:
        return {**self.response, "output": list(self.response["output"])}

    def created(self) -> list[dict[str, Any]]:
        """The request was accepted by the gateway."""
        return [self._event("response.created", response=self._snapshot())]

    def queued(self) -> list[dict[str, Any]]:
        """The request waits (background)."""
        self.response["status"] = "queued"
        return [self._event("response.queued", response=self._snapshot())]

    def start(self, event: GenerationStart) -> list[dict[str, Any]]:  # noqa: ARG002  (one signature for all dialects)
        """The prompt was accepted by an engine."""
        self.response["status"] = "in_progress"
        return [self._event("response.in_progress", response=self._snapshot())]

    def delta(self, event: ChoiceDelta) -> list[dict[str, Any]]:
        """Something was gained: items open and close as its kind changes."""
        out: list[dict[str, Any]] = []
        if event.reasoning:
            out += self._enter("reasoning", 0)
            out.append(self._piece("response.reasoning.delta", event.reasoning, content_index=0))
        if event.text or (self._logprobs and event.logprobs and not event.reasoning and not event.tool_calls):
            out += self._enter("message", 0)
            out.append(self._text(event))
        for piece in event.tool_calls:
            out += self._enter("function_call", piece.index, call_id=piece.id, name=piece.name)
            if piece.arguments:
                out.append(self._piece("response.function_call_arguments.delta", piece.arguments))
        if event.finish_reason:
            self._finish = event.finish_reason
            out += self._leave("incomplete" if event.finish_reason == "length" else "completed")
        return out

    def _text(self, event: ChoiceDelta) -> dict[str, Any]:
        entries = _logprob_entries(event.logprobs) if self._logprobs and event.logprobs else []
        self._entries += entries
        return self._piece("response.output_text.delta", event.text, content_index=0, logprobs=entries)

    def _piece(self, kind: str, delta: str, **more: Any) -> dict[str, Any]:
        self._parts.append(delta)
        return self._event(kind, **self._where(), delta=delta, **more)

    def _where(self) -> dict[str, Any]:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": len(self.response["output"]) - 1}

    def _enter(self, kind: str, key: int, **fields: Any) -> list[dict[str, Any]]:
        if self._item is not None and self._key == (kind, key):
            return []
        out = self._leave("completed")
        item = _new_item(kind, item_id(self.response["id"], kind, len(self.response["output"])), **fields)
        self._item, self._key, self._parts, self._entries = item, (kind, key), [], []
        self.response["output"].append(item)
        index = len(self.response["output"]) - 1
        out.append(self._event("response.output_item.added", output_index=index, item=dict(item)))
        if kind != "function_call":
            part = _part(kind, "", [])
            out.append(self._event("response.content_part.added", **self._where(), content_index=0, part=part))
        return out

    def _leave(self, status: str) -> list[dict[str, Any]]:
        if self._item is None:
            return []
        kind, text, where = self._key[0], "".join(self._parts), self._where()
        out: list[dict[str, Any]] = []
        item = dict(self._item)
        if kind == "function_call":
            item["arguments"] = text
            out.append(self._event("response.function_call_arguments.done", **where, name=item["name"], arguments=text))
        else:
            part = _part(kind, text, self._entries)
            item["content"] = [part]
            if kind == "message":
                fields: dict[str, Any] = {"text": text, "logprobs": self._entries}
                out.append(self._event("response.output_text.done", **where, content_index=0, **fields))
            else:
                out.append(self._event("response.reasoning.done", **where, content_index=0, text=text))
            out.append(self._event("response.content_part.done", **where, content_index=0, part=part))
        if "status" in item:
            item["status"] = status
        self.response["output"][-1] = item
        self._item = None
        out.append(self._event("response.output_item.done", output_index=where["output_index"], item=item))
        return out

    def end(self, event: GenerationEnd, completed_at: int) -> list[dict[str, Any]]:
        """All is there: usage and the final status."""
        out = self._leave("completed")
        self.response["usage"] = _usage(event.usage)
        self.response["completed_at"] = completed_at
        if self._finish == "length":
            self.response["status"] = "incomplete"
            self.response["completed_at"] = None
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
            kind = "response.incomplete"
        else:
            self.response["status"] = "completed"
            kind = "response.completed"
        out.append(self._event(kind, response=self._snapshot()))
        return out

    def error(self, error: SageError) -> list[dict[str, Any]]:
        """The request failed: what was said so far stays, as incomplete."""
        out = self._leave("incomplete")
        body = openai_body(error, "")["error"]
        self.response["status"] = "failed"
        self.response["error"] = {"code": body["code"], "message": body["message"]}
        out.append(self._event("error", error=body, **{k: body[k] for k in ("code", "message", "param")}))
        out.append(self._event("response.failed", response=self._snapshot()))
        return out

    def cancel(self, error: SageError) -> list[dict[str, Any]]:
        """Somebody cancelled the request: what was said so far stays, as incomplete."""
        out = self._leave("incomplete")
        self.response["status"] = "cancelled"
        body = openai_body(error, "")["error"]
        out.append(self._event("error", error=body, **{k: body[k] for k in ("code", "message", "param")}))
        return out


def item_id(response_id: str, kind: str, index: int) -> str:
    """Return the id of a response's output item; it tells which response to look in (`response_of_item`)."""
    return f"{ITEM_PREFIX[kind]}{response_id.partition('_')[2]}_{index}"


def response_of_item(item_id: str) -> str:
    """Return the id of the response that an output item is of; of other ids, one that no response has."""
    return f"resp_{item_id.partition('_')[2].partition('_')[0]}"


def _new_item(kind: str, item_id: str, **fields: Any) -> dict[str, Any]:
    if kind == "message":
        return {"type": kind, "id": item_id, "status": "in_progress", "role": "assistant", "content": []}
    if kind == "reasoning":
        return {"type": kind, "id": item_id, "summary": [], "content": []}
    return {
        "type": kind,
        "id": item_id,
        "call_id": fields["call_id"],
        "name": fields["name"],
        "arguments": "",
        "status": "in_progress",
    }


def _part(kind: str, text: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(entries)}


def _logprob_entries(entries: tuple[TokenLogprob, ...]) -> list[dict[str, Any]]:
    return [token_logprob_json(e) for e in entries]


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.total_tokens,
    }


def _format_json(form: FormatWire | None) -> dict[str, Any]:
    if form is None:
        return {"type": "text"}
    if form.type != "json_schema":
        return {"type": form.type}
    return {
        "type": form.type,
        "name": form.name or "response",
        "description": form.description,
        "schema": form.schema,
        "strict": form.strict is not False,
    }


def _resource(body: ResponsesBody, request: GenerationRequest, created: int) -> dict[str, Any]:
    reasoning = body.reasoning
    text: dict[str, Any] = {"format": _format_json(body.text.format if body.text is not None else None)}
    if body.text is not None and body.text.verbosity is not None:
        text["verbosity"] = body.text.verbosity
    choice = body.tool_choice if body.tool_choice is not None else "auto"
    return {
        "id": request.request_id,
        "object": "response",
        "created_at": created,
        "completed_at": None,
        "status": "in_progress",
        "background": bool(body.background),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "model": body.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "presence_penalty": request.sampling.presence_penalty,
        "frequency_penalty": request.sampling.frequency_penalty,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {
            "effort": reasoning.effort if reasoning is not None else None,
            "summary": reasoning.summary if reasoning is not None else None,
        },
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": request.sampling.temperature,
        "text": text,
        "tool_choice": choice if isinstance(choice, str) else msgspec.to_builtins(choice),
        "tools": [
            {
                "type": "function",
                "name": t.name,
                "description": t.description,
                "parameters": t.parameters,
                "strict": t.strict,
            }
            for t in body.tools or ()
        ],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": request.sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        "metadata": body.metadata or {},
    }
