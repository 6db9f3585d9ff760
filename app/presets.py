"""The providers that Sluice knows by name: where each is, how it is entered, what it speaks.

A connection names one of these, or any other name together with its own base URL; what is not known
here speaks OpenAI's protocol and takes its key as a bearer token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

Protocol = Literal["openai", "anthropic"]
KeyHeader = Literal["authorization", "x-api-key", "api-key"]

#: The provider of a connection that says nothing but where it is.
COMPATIBLE: Final = "openai-compatible"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """What is known of a provider.

    ``base_url`` None: every connection must say its own. ``key_header``: where the key goes;
    ``authorization`` means as a bearer token. ``needs_key``: whether nobody enters without one.
    """

    id: str
    name: str
    base_url: str | None
    protocol: Protocol = "openai"
    key_header: KeyHeader = "authorization"
    needs_key: bool = True
    hint: str = ""

    def schema(self) -> dict[str, object]:
        """The form of a connection's ``config``, as JSON Schema; secrets have the format "secret"."""
        base_url: dict[str, object] = {
            "type": "string",
            "format": "uri",
            "title": "Base URL",
            "description": self.hint or "Where the provider's API is.",
        }
        if self.base_url is not None:
            base_url["default"] = self.base_url
        required = ["apiKey"] if self.needs_key else []
        if self.base_url is None:
            required.append("baseUrl")
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "type": "object",
            "properties": {
                "apiKey": {
                    "type": "string",
                    "format": "secret",
                    "writeOnly": True,
                    "title": "API key",
                    "description": "Stored sealed, shown as ********.",
                },
                "baseUrl": base_url,
            },
            "required": required,
        }


PROVIDERS: Final[Mapping[str, Preset]] = MappingProxyType(
    {
        preset.id: preset
        for preset in (
            Preset(id="openai", name="OpenAI", base_url="https://api.openai.com/v1"),
            Preset(
                id="anthropic",
                name="Anthropic",
                base_url="https://api.anthropic.com/v1",
                protocol="anthropic",
                key_header="x-api-key",
            ),
            Preset(
                id="azure-openai",
                name="Azure OpenAI",
                base_url=None,
                key_header="api-key",
                hint="Such as https://NAME.openai.azure.com/openai/v1; models are deployments.",
            ),
            Preset(id="groq", name="Groq", base_url="https://api.groq.com/openai/v1"),
            Preset(
                id="gemini",
                name="Google Gemini",
                base_url="https://generativelanguage.googleapis.com/v1beta/openai",
            ),
            Preset(id="perplexity", name="Perplexity", base_url="https://api.perplexity.ai"),
            Preset(id="openrouter", name="OpenRouter", base_url="https://openrouter.ai/api/v1"),
            Preset(id="mistral", name="Mistral", base_url="https://api.mistral.ai/v1"),
            Preset(id="together", name="Together AI", base_url="https://api.together.xyz/v1"),
            Preset(id="deepseek", name="DeepSeek", base_url="https://api.deepseek.com/v1"),
            Preset(id="xai", name="xAI", base_url="https://api.x.ai/v1"),
            Preset(
                id="fireworks",
                name="Fireworks AI",
                base_url="https://api.fireworks.ai/inference/v1",
            ),
            Preset(id="cerebras", name="Cerebras", base_url="https://api.cerebras.ai/v1"),
            Preset(
                id="ollama",
                name="Ollama",
                base_url="http://127.0.0.1:11434/v1",
                needs_key=False,
                hint="Where Ollama listens, with /v1.",
            ),
            Preset(
                id="vllm",
                name="vLLM",
                base_url="http://127.0.0.1:8000/v1",
                needs_key=False,
                hint="Where the server listens, with /v1.",
            ),
            Preset(
                id=COMPATIBLE,
                name="Anything that speaks OpenAI's protocol",
                base_url=None,
                needs_key=False,
                hint="Such as http://127.0.0.1:8000/v1.",
            ),
        )
    }
)


def protocol_of(provider: str) -> Protocol:
    """What a connection's provider speaks."""
    known = PROVIDERS.get(provider)
    return known.protocol if known is not None else "openai"


def key_header_of(provider: str) -> KeyHeader:
    """Where a connection's key goes."""
    known = PROVIDERS.get(provider)
    return known.key_header if known is not None else "authorization"
