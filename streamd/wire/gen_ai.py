"""The words of OpenTelemetry's conventions for generative AI: the operation of a request, the provider behind a host.

https://opentelemetry.io/docs/specs/semconv/gen-ai/ (version 1.44, in development).
"""

from __future__ import annotations

from typing import Final

from streamd.wire.dialect import Dialect, generates

CHAT: Final = "chat"
GENERATE: Final = "generate_content"

_BY_DIALECT: Final = {
    Dialect.CHAT: CHAT,
    Dialect.RESPONSES: CHAT,
    Dialect.MESSAGES: CHAT,
    Dialect.COMPLETIONS: "text_completion",
    Dialect.GEMINI: GENERATE,
}
# By the end of a path that belongs to no known dialect. Paths that aren't here are no generations.
_BY_END: Final = {
    "/embeddings": "embeddings",
    "/images/generations": GENERATE,
    "/images/edits": GENERATE,
    "/audio/speech": GENERATE,
    "/audio/transcriptions": GENERATE,
    "/audio/translations": GENERATE,
}
# Google's methods stand behind a colon; the others of its API count tokens, or manage files.
_BY_METHOD: Final = {
    "generateContent": GENERATE,
    "streamGenerateContent": GENERATE,
    "embedContent": "embeddings",
    "batchEmbedContents": "embeddings",
}
# Paths below that of Messages, such as count_tokens, make nothing.
_MESSAGES: Final = "/v1/messages"

_PROVIDERS: Final = {
    "openai.com": "openai",
    "openai.azure.com": "azure.ai.openai",
    "services.ai.azure.com": "azure.ai.inference",
    "models.ai.azure.com": "azure.ai.inference",
    "anthropic.com": "anthropic",
    "generativelanguage.googleapis.com": "gcp.gemini",
    "aiplatform.googleapis.com": "gcp.vertex_ai",
    "mistral.ai": "mistral_ai",
    "groq.com": "groq",
    "deepseek.com": "deepseek",
    "perplexity.ai": "perplexity",
    "x.ai": "x_ai",
    "cohere.com": "cohere",
    "cohere.ai": "cohere",
}


def operation_of(method: str, path: str, dialect: Dialect) -> str:
    """The name of the operation that a request asks for; "" if it asks for no generation."""
    path = path.rstrip("/")
    if not generates(method, path) or (dialect is Dialect.MESSAGES and path != _MESSAGES):
        return ""
    if dialect is Dialect.GEMINI:
        return _BY_METHOD.get(path.rpartition(":")[2], "")
    if dialect is not Dialect.UNKNOWN:
        return _BY_DIALECT[dialect]
    return next((name for end, name in _BY_END.items() if path.endswith(end)), "")


def provider_of(host: str) -> str:
    """The provider that runs this host, "" if it isn't known: it may be any server of the operator's own."""
    labels = host.lower().split(".")
    return next((name for k in range(len(labels)) if (name := _PROVIDERS.get(".".join(labels[k:])))), "")
