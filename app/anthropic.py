"""OpenAI's chat completions in the words of Anthropic's Messages, there and back. Pure: no network.

``to_messages`` writes the request, ``to_completion`` the reply. What Messages cannot do is refused
with a sentence (`UntranslatableError`), at a batch's creation: several choices, log probabilities,
audio, the old ``functions``. What it does a little differently is done:

system, developer      the system prompt, in their order
tool calls, results    ``tool_use`` and ``tool_result`` blocks; several results are one user message
images                 base64 or by URL; PDF files as documents
max_tokens             `MAX_TOKENS` where a request says none, for Messages insists on one
temperature            at most 1
response_format        a JSON schema becomes a tool that must be called, and its input the answer;
                       ``json_object`` a sentence in the system prompt
penalties, seed        passed over: there is nothing like them
"""

import json
from collections.abc import Mapping
from typing import Final, cast

import msgspec

Json = dict[str, object]

VERSION: Final = "2023-06-01"
MAX_TOKENS: Final = 4096
_MOST_TEMPERATURE: Final = 1.0
_JSON_ONLY: Final = "Answer with one JSON object and nothing else."

_FINISH: Final[Mapping[str, str]] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}


class UntranslatableError(ValueError):
    """A request that Messages cannot serve; ``str()`` is the sentence that says why."""


# The request --------------------------------------------------------------------------------------


def to_messages(request: Mapping[str, object], *, model: str) -> Json:
    """A chat completion's request as one of Messages. Raises UntranslatableError."""
    _refuse(request)
    system, messages = _conversation(request.get("messages"))
    body: Json = {
        "model": model,
        "max_tokens": _first(request, "max_completion_tokens", "max_tokens") or MAX_TOKENS,
        "messages": messages,
    }
    if _format(request) == "json_object":
        system.append({"type": "text", "text": _JSON_ONLY})
    if system:
        body["system"] = system
    body |= _tooling(request)
    stop = request.get("stop")
    if stop:
        body["stop_sequences"] = [stop] if isinstance(stop, str) else stop
    temperature = request.get("temperature")
    if isinstance(temperature, int | float):
        body["temperature"] = min(temperature, _MOST_TEMPERATURE)
    for name in ("top_p", "top_k", "thinking"):
        if request.get(name) is not None:
            body[name] = request[name]
    user = _first(request, "safety_identifier", "user")
    if isinstance(user, str):
        body["metadata"] = {"user_id": user}
    return body


def check(request: Mapping[str, object]) -> None:
    """Raise UntranslatableError, which is a ValueError, for what ``to_messages`` would refuse."""
    to_messages(request, model="")


def _refuse(request: Mapping[str, object]) -> None:
    n = request.get("n")
    if n is not None and n != 1:
        raise UntranslatableError("n must be 1: Anthropic gives one choice per call")
    for name in ("logprobs", "top_logprobs", "logit_bias", "audio", "functions", "function_call"):
        if request.get(name):
            raise UntranslatableError(f"{name} is not something that Anthropic's models can do")
    modalities = request.get("modalities")
    if modalities is not None and modalities != ["text"]:
        raise UntranslatableError("modalities must be text alone for Anthropic's models")


def _first(request: Mapping[str, object], *names: str) -> object:
    return next((request[name] for name in names if request.get(name) is not None), None)


def _conversation(given: object) -> tuple[list[Json], list[Json]]:
    """The system prompt's blocks and the messages; neighbours of one role become one."""
    if not isinstance(given, list) or not given:
        raise UntranslatableError("messages must be an array with at least one message")
    system: list[Json] = []
    messages: list[Json] = []
    for number, each in enumerate(cast("list[object]", given)):
        where = f"messages[{number}]"
        if not isinstance(each, dict):
            raise UntranslatableError(f"{where} must be an object")
        message = cast("Json", each)
        match message.get("role"):
            case "system" | "developer":
                system += _blocks(message.get("content"), where)
                continue
            case "user":
                role, blocks = "user", _blocks(message.get("content"), where)
            case "assistant":
                role, blocks = "assistant", _assistant(message, where)
            case "tool":
                role, blocks = "user", [_tool_result(message, where)]
            case other:
                raise UntranslatableError(f"{where}.role {other!r} is not known to Anthropic")
        if messages and messages[-1]["role"] == role:
            cast("list[Json]", messages[-1]["content"]).extend(blocks)
        else:
            messages.append({"role": role, "content": blocks})
    if not messages:
        raise UntranslatableError("messages must have one that is not the system's")
    return system, messages


def _blocks(content: object, where: str) -> list[Json]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if content is None:
        return []
    if not isinstance(content, list):
        raise UntranslatableError(f"{where}.content must be text or an array of parts")
    return [
        _part(part, f"{where}.content[{number}]")
        for number, part in enumerate(cast("list[object]", content))
    ]


def _part(given: object, where: str) -> Json:
    if not isinstance(given, dict):
        raise UntranslatableError(f"{where} must be an object")
    part = cast("Json", given)
    match part.get("type"):
        case "text" | "refusal" as kind:
            block: Json = {"type": "text", "text": part.get(str(kind)) or ""}
        case "image_url":
            block = {"type": "image", "source": _source(_member(part, "image_url", "url"), where)}
        case "file":
            data = _member(part, "file", "file_data")
            block = {"type": "document", "source": _source(data, where)}
        case other:
            raise UntranslatableError(f"{where} is of the type {other!r}, which cannot be sent")
    if "cache_control" in part:
        block["cache_control"] = part["cache_control"]
    return block


def _member(part: Json, name: str, inner: str) -> object:
    held = part.get(name)
    return cast("Json", held).get(inner) if isinstance(held, dict) else held


def _source(url: object, where: str) -> Json:
    """Where an image or a document is: within the message (RFC 2397), or at an address."""
    if not isinstance(url, str) or not url:
        raise UntranslatableError(f"{where} has neither a URL nor data")
    if url.startswith(("https://", "http://")):
        return {"type": "url", "url": url}
    head, comma, data = url.partition(",")
    kind = head.removeprefix("data:").removesuffix(";base64")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise UntranslatableError(f"{where} must be a URL, or data:TYPE;base64,…")
    return {"type": "base64", "media_type": kind.partition(";")[0], "data": data}


def _assistant(message: Json, where: str) -> list[Json]:
    blocks = _blocks(message.get("content"), where)
    calls = message.get("tool_calls")
    for number, each in enumerate(cast("list[object]", calls) if isinstance(calls, list) else []):
        call = cast("Json", each) if isinstance(each, dict) else {}
        function = call.get("function")
        if not isinstance(function, dict):
            raise UntranslatableError(f"{where}.tool_calls[{number}] is not the call of a function")
        named = cast("Json", function)
        blocks.append(
            {
                "type": "tool_use",
                "id": call.get("id"),
                "name": named.get("name"),
                "input": _arguments(named.get("arguments"), f"{where}.tool_calls[{number}]"),
            }
        )
    return blocks


def _arguments(text: object, where: str) -> Json:
    if text in (None, ""):
        return {}
    try:
        found: object = msgspec.json.decode(text) if isinstance(text, str) else None
    except msgspec.DecodeError:
        found = None
    if not isinstance(found, dict):
        raise UntranslatableError(f"{where}.function.arguments must be a JSON object as text")
    return cast("Json", found)


def _tool_result(message: Json, where: str) -> Json:
    return {
        "type": "tool_result",
        "tool_use_id": message.get("tool_call_id"),
        "content": _blocks(message.get("content"), where),
    }


def _tools(given: object) -> list[Json]:
    tools: list[Json] = []
    for number, each in enumerate(cast("list[object]", given) if isinstance(given, list) else []):
        tool = cast("Json", each) if isinstance(each, dict) else {}
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise UntranslatableError(f"tools[{number}] is not a function")
        named = cast("Json", function)
        made: Json = {
            "name": named.get("name"),
            "input_schema": named.get("parameters") or {"type": "object"},
        }
        if named.get("description") is not None:
            made["description"] = named["description"]
        tools.append(made)
    return tools


def _tooling(request: Mapping[str, object]) -> Json:
    """The tools and which to use, of the request or of its response format."""
    tools = _tools(request.get("tools"))
    forced = _schema_tool(request.get("response_format"))
    if forced is not None:
        if tools:
            raise UntranslatableError("response_format and tools cannot be combined here")
        return {"tools": [forced], "tool_choice": {"type": "tool", "name": forced["name"]}}
    if not tools:
        return {}
    choice = _tool_choice(request.get("tool_choice"), request.get("parallel_tool_calls"))
    tooling: Json = {"tools": tools}
    if choice is not None:
        tooling["tool_choice"] = choice
    return tooling


def _tool_choice(given: object, parallel: object) -> Json | None:
    choice: Json | None
    match given:
        case None:
            choice = None
        case "auto" | "none":
            choice = {"type": given}
        case "required":
            choice = {"type": "any"}
        case {"type": "function", "function": {"name": str() as name}}:
            choice = {"type": "tool", "name": name}
        case _:
            raise UntranslatableError("tool_choice must be auto, none, required or a function")
    if parallel is False and given != "none":
        choice = {"type": "auto", **(choice or {}), "disable_parallel_tool_use": True}
    return choice


def _format(request: Mapping[str, object]) -> object:
    given = request.get("response_format")
    return cast("Json", given).get("type") if isinstance(given, dict) else None


#: How `to_completion` knows the tool that stands for a response format.
_SCHEMA_TOOL: Final = "structured_answer"


def _schema_tool(given: object) -> Json | None:
    match given:
        case None | {"type": "text"} | {"type": "json_object"}:
            return None
        case {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}:
            held = cast("Mapping[str, Json]", given)["json_schema"]
            return {
                "name": _SCHEMA_TOOL,
                "description": "Give the answer in this form.",
                "input_schema": held["schema"],
            }
        case _:
            raise UntranslatableError(
                "response_format must be text, json_object, or json_schema with the schema of an object"
            )


# The reply ----------------------------------------------------------------------------------------


def to_completion(reply: bytes, *, created: int) -> bytes | None:
    """A Message as a chat completion; None: it is none. ``created``: seconds since 1970."""
    try:
        found: object = json.loads(reply)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    message = cast("Json", found)
    content = message.get("content")
    if message.get("type") != "message" or not isinstance(content, list):
        return None
    blocks = [
        cast("Json", each) for each in cast("list[object]", content) if isinstance(each, dict)
    ]
    text = "".join(str(b.get("text") or "") for b in blocks if b.get("type") == "text")
    thought = "".join(str(b.get("thinking") or "") for b in blocks if b.get("type") == "thinking")
    calls = [b for b in blocks if b.get("type") == "tool_use"]
    finish = _FINISH.get(str(message.get("stop_reason")), "stop")
    structured = next((b for b in calls if b.get("name") == _SCHEMA_TOOL), None)
    if structured is not None:
        text, calls = json.dumps(structured.get("input"), ensure_ascii=False), []
        finish = "stop" if finish == "tool_calls" else finish
    said: Json = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
    if thought:
        said["reasoning_content"] = thought
    if calls:
        said["tool_calls"] = [
            {
                "id": call.get("id"),
                "type": "function",
                "function": {
                    "name": call.get("name"),
                    "arguments": json.dumps(call.get("input") or {}, ensure_ascii=False),
                },
            }
            for call in calls
        ]
    completion: Json = {
        "id": message.get("id"),
        "object": "chat.completion",
        "created": created,
        "model": message.get("model"),
        "choices": [{"index": 0, "message": said, "logprobs": None, "finish_reason": finish}],
    }
    usage = _usage(message.get("usage"))
    if usage is not None:
        completion["usage"] = usage
    return encoded(completion)


def _usage(given: object) -> Json | None:
    """Tokens as OpenAI counts: what was read from a cache, or written to it, is part of the prompt."""
    if not isinstance(given, dict):
        return None
    usage = cast("Json", given)

    def count(name: str) -> int:
        value = usage.get(name)
        return value if isinstance(value, int) and value >= 0 else 0

    cached = count("cache_read_input_tokens")
    read = count("input_tokens") + cached + count("cache_creation_input_tokens")
    written = count("output_tokens")
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def encoded(body: Json) -> bytes:
    """JSON, also of text with halves of surrogate pairs, which JSON's grammar allows."""
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError:
        return json.dumps(body).encode()
