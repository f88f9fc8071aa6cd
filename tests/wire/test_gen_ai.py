"""The words of OpenTelemetry's conventions for generative AI."""

from __future__ import annotations

import pytest

from streamd.wire.dialect import dialect_of
from streamd.wire.gen_ai import operation_of, provider_of


@pytest.mark.parametrize(
    ("method", "path", "operation"),
    [
        ("POST", "/v1/chat/completions", "chat"),
        ("POST", "/v1/chat/completions/", "chat"),
        ("POST", "/v1/responses", "chat"),
        ("POST", "/v1/messages", "chat"),
        ("POST", "/v1/completions", "text_completion"),
        ("POST", "/v1beta/models/gemini-2:streamGenerateContent", "generate_content"),
        ("POST", "/v1beta/models/gemini-2:generateContent", "generate_content"),
        ("POST", "/v1beta/models/gemini-2:embedContent", "embeddings"),
        ("POST", "/v1beta/models/gemini-2:countTokens", ""),
        ("POST", "/v1/embeddings", "embeddings"),
        ("POST", "/v1/images/generations", "generate_content"),
        ("POST", "/v1/messages/count_tokens", ""),
        ("POST", "/v1/responses/resp_1/cancel", ""),
        ("POST", "/v1/files", ""),
        ("GET", "/v1/responses/resp_1", ""),
        ("GET", "/v1/models", ""),
    ],
)
def test_a_request_for_a_generation_has_an_operation(method: str, path: str, operation: str) -> None:
    assert operation_of(method, path, dialect_of(path)) == operation


@pytest.mark.parametrize(
    ("host", "provider"),
    [
        ("api.openai.com", "openai"),
        ("eu.api.OpenAI.com", "openai"),
        ("mine.openai.azure.com", "azure.ai.openai"),
        ("generativelanguage.googleapis.com", "gcp.gemini"),
        ("api.anthropic.com", "anthropic"),
        ("notopenai.com", ""),
        ("openai.com.example", ""),
        ("127.0.0.1", ""),
        ("", ""),
    ],
)
def test_a_provider_is_known_by_its_domain_alone(host: str, provider: str) -> None:
    assert provider_of(host) == provider
