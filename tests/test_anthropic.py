"""OpenAI's words in Anthropic's, there and back; and a batch through the Messages of a simulator."""

import json
from typing import Any

import pytest

from app import anthropic
from app.anthropic import MAX_TOKENS, UntranslatableError, to_completion, to_messages
from app.provider import Answered, Call, Endpoint, Provider, Rejected, Throttled, Unreachable
from app.simulator import Behaviour, Simulator

Json = dict[str, Any]

PIXEL = "data:image/png;base64,iVBORw0KGgo="


def asked(*messages: Json, **more: object) -> Json:
    return to_messages(
        {"messages": list(messages) or [{"role": "user", "content": "Hi"}], **more}, model="m"
    )


def text(said: str) -> Json:
    return {"type": "text", "text": said}


def test_a_conversation_with_tools() -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Bern"}'},
    }
    body = asked(
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": [text("In German.")]},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call, call | {"id": "call_2"}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        {"role": "tool", "tool_call_id": "call_2", "content": [text("warm")]},
        {"role": "user", "content": "And?"},
        tools=[
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "description": "d",
                    "parameters": {"type": "object"},
                },
            }
        ],
        tool_choice={"type": "function", "function": {"name": "weather"}},
        parallel_tool_calls=False,
        max_completion_tokens=50,
        stop="END",
        temperature=1.7,
        top_p=0.5,
        user="u1",
        model="ignored",
        seed=1,
    )
    use = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Bern"}}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": [text("sunny")]}
    assert body == {
        "model": "m",
        "max_tokens": 50,
        "system": [text("Be brief."), text("In German.")],
        "messages": [
            {"role": "user", "content": [text("Weather?")]},
            {"role": "assistant", "content": [use, use | {"id": "call_2"}]},
            {
                "role": "user",
                "content": [
                    result,
                    result | {"tool_use_id": "call_2", "content": [text("warm")]},
                    text("And?"),
                ],
            },
        ],
        "tools": [{"name": "weather", "description": "d", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
        "stop_sequences": ["END"],
        "temperature": 1.0,
        "top_p": 0.5,
        "metadata": {"user_id": "u1"},
    }


def test_what_a_plain_request_becomes() -> None:
    assert asked() == {
        "model": "m",
        "max_tokens": MAX_TOKENS,
        "messages": [{"role": "user", "content": [text("Hi")]}],
    }


def test_images_and_documents() -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": PIXEL}},
        {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
        {"type": "file", "file": {"file_data": "data:application/pdf;base64,JVBE"}},
    ]
    (message,) = asked({"role": "user", "content": parts})["messages"]
    data = {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}
    assert [block["source"] for block in message["content"]] == [
        data,
        {"type": "url", "url": "https://x/y.png"},
        {"type": "base64", "media_type": "application/pdf", "data": "JVBE"},
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("auto", {"type": "auto"}),
        ("none", {"type": "none"}),
        ("required", {"type": "any"}),
    ],
)
def test_tool_choices(given: str, expected: Json) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    assert asked(tools=[tool], tool_choice=given)["tool_choice"] == expected
    assert "tool_choice" not in asked(tool_choice=given)  # without tools it means nothing


def test_a_schema_becomes_a_tool_and_its_input_the_answer() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = asked(response_format=form)
    name = body["tools"][0]["name"]
    assert body["tool_choice"] == {"type": "tool", "name": name}
    found = completion(
        content=[{"type": "tool_use", "id": "t", "name": name, "input": {"city": "Bern"}}],
        stop_reason="tool_use",
    )
    (choice,) = found["choices"]
    assert json.loads(choice["message"]["content"]) == {"city": "Bern"}
    assert (choice["finish_reason"], "tool_calls" in choice["message"]) == ("stop", False)
    assert asked(response_format={"type": "json_object"})["system"]


IMPOSSIBLE: list[tuple[Json, str]] = [
    ({"n": 2}, "n must be 1"),
    ({"logprobs": True}, "logprobs"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"functions": [{}]}, "functions"),
    ({"messages": []}, "messages"),
    ({"messages": [1]}, r"messages\[0\]"),
    ({"messages": [{"role": "system", "content": "x"}]}, "system"),
    ({"messages": [{"role": "function", "content": "x"}]}, "role"),
    ({"messages": [{"role": "user", "content": 1}]}, "content"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input_audio"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "URL",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "["}}]}]},
        "arguments",
    ),
    ({"tools": [{"type": "web_search"}]}, r"tools\[0\]"),
    ({"tools": [{"type": "function", "function": {}}], "tool_choice": 1}, "tool_choice"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
]


@pytest.mark.parametrize(("request_", "word"), IMPOSSIBLE)
def test_what_messages_cannot_do_is_refused(request_: Json, word: str) -> None:
    usual = {"messages": [{"role": "user", "content": "Hi"}]}
    with pytest.raises(UntranslatableError, match=word):
        anthropic.check(usual | request_)


def completion(**message: object) -> Json:
    usual: Json = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude",
        "content": [],
    }
    found = to_completion(json.dumps(usual | message).encode(), created=7)
    assert found is not None
    return json.loads(found)


def test_a_message_becomes_a_completion() -> None:
    found = completion(
        content=[
            {"type": "thinking", "thinking": "hm"},
            text("Let me "),
            text("look."),
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Bern"}},
        ],
        stop_reason="tool_use",
        usage={
            "input_tokens": 10,
            "cache_read_input_tokens": 5,
            "cache_creation_input_tokens": 2,
            "output_tokens": 3,
        },
    )
    call = {
        "id": "t1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Bern"}'},
    }
    assert found == {
        "id": "msg_1",
        "object": "chat.completion",
        "created": 7,
        "model": "claude",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Let me look.",
                    "refusal": None,
                    "reasoning_content": "hm",
                    "tool_calls": [call],
                },
                "logprobs": None,
                "finish_reason": "tool_calls",
            }
        ],
        "usage": {
            "prompt_tokens": 17,
            "completion_tokens": 3,
            "total_tokens": 20,
            "prompt_tokens_details": {"cached_tokens": 5},
        },
    }


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("refusal", "content_filter"),
        ("something new", "stop"),
        (None, "stop"),
    ],
)
def test_why_it_ended(reason: str | None, expected: str) -> None:
    assert completion(stop_reason=reason)["choices"][0]["finish_reason"] == expected


def test_what_is_no_message_is_none() -> None:
    for reply in (b"", b"[]", b"{}", b'{"type":"message"}', b'{"choices":[]}', b"[" * 5000):
        assert to_completion(reply, created=0) is None


def call_of(url: str, *, key: str | None = "sk-ant", **body: object) -> Call:
    request = {"messages": [{"role": "user", "content": "Hi"}], **body}
    return Call(
        base_url=url,
        endpoint=Endpoint.chat_completions,
        model="claude",
        body=json.dumps(request).encode(),
        timeout_s=10,
        api_key=key,
        protocol="anthropic",
        key_header="x-api-key",
    )


async def test_a_provider_that_speaks_messages() -> None:
    """With its own header for the key, its limits, and its words for what is wrong."""
    simulator = Simulator(
        Behaviour(
            port=0, latency_ms=0, require_key="sk-ant", rpm=3, header_style="anthropic", seed=1
        )
    )
    url = await simulator.start()
    try:
        async with Provider(max_connections=2) as provider:
            for base_url in (url, f"{url}/v1"):
                found = await provider.call(call_of(base_url, max_tokens=20))
                assert isinstance(found, Answered)
                body = json.loads(found.body)
                assert body["object"] == "chat.completion"
                assert body["choices"][0]["message"]["content"].startswith("[simulated]")
                assert found.usage is not None
                assert found.usage.output_tokens == body["usage"]["completion_tokens"] > 0
                assert [limit.limit for limit in found.rate_limits] == [3]
            refused = await provider.call(call_of(url, key="sk-wrong"))
            assert isinstance(refused, Rejected)
            assert (refused.status_code, refused.code) == (401, "unauthorized")
            assert "Incorrect API key" in refused.message
            assert isinstance(await provider.call(call_of(url)), Answered)
            throttled = await provider.call(call_of(url))
            assert isinstance(throttled, Throttled)
            assert throttled.retry_after_s is not None
            unasked = await provider.call(call_of(url, n=2))
            assert isinstance(unasked, Rejected)
            assert (unasked.code, unasked.status_code) == ("bad_request_body", None)
            simulator.change({"error_rate": 1.0, "rpm": None})
            assert isinstance(await provider.call(call_of(url)), Unreachable)
    finally:
        await simulator.stop()
