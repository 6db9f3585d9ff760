"""What a person wants of a provider's reply: its text."""

import json
from typing import Any, cast


def answer_text(endpoint: str, response: str | None) -> str:
    """The text in a provider's reply, exactly; what is not text (a vector, a tool call) as JSON.

    Empty when the reply has no such thing: it is in the response all the same.
    """
    try:
        reply = cast("dict[str, Any]", json.loads(response or "null"))
        match endpoint:
            case "/v1/chat/completions":
                return _chat_text(reply)
            case "/v1/responses":
                return _responses_text(reply)
            case "/v1/completions":
                return str(reply["choices"][0]["text"])
            case "/v1/embeddings":
                vectors = [entry["embedding"] for entry in reply["data"]]
                return _json(vectors[0] if len(vectors) == 1 else vectors)
            case _:
                return _json(reply["results"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError):
        return ""


def _chat_text(reply: dict[str, Any]) -> str:
    message = reply["choices"][0]["message"]
    content = message.get("content")
    if isinstance(content, str):
        return content
    other = message.get("tool_calls") or content or message.get("refusal")
    return other if isinstance(other, str) else "" if other is None else _json(other)


def _responses_text(reply: dict[str, Any]) -> str:
    parts = [
        part["text"]
        for entry in reply["output"]
        for part in entry.get("content") or ()
        if part.get("type") == "output_text"
    ]
    return "".join(parts)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
