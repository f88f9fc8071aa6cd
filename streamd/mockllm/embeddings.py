"""OpenAI's embeddings: a few numbers derived from the text, so that the same text gets the same vector."""

from __future__ import annotations

import base64
import hashlib
import struct
from typing import Any, Final

import orjson

from streamd.mockllm.ask import PROMPT_BYTES_PER_TOKEN, BadAsk, json_object

DIMENSIONS: Final = 8  # a SHA-256 as eight signed numbers: enough to compare, short enough to read
INPUTS_MAX: Final = 2048  # OpenAI's bound


def embeddings(body: bytes, model: str) -> bytes:
    """The answer to a request's body. `model`: the name if the request has none. Raises BadAsk."""
    asked = json_object(body)
    given = asked.get("input")
    # Why: a list of numbers is a single input, tokenized before.
    inputs = given if isinstance(given, list) and not all(isinstance(each, int) for each in given) else [given]
    if not given or len(inputs) > INPUTS_MAX:
        raise BadAsk(f"`input` has to be a text or a list of 1 to {INPUTS_MAX} of them.", "input")
    as_base64 = asked.get("encoding_format") == "base64"
    vectors = [vector_of(orjson.dumps(each)) for each in inputs]
    tokens = len(orjson.dumps(inputs)) // PROMPT_BYTES_PER_TOKEN + 1
    entries: list[dict[str, Any]] = [
        {"object": "embedding", "index": index, "embedding": _packed(vector) if as_base64 else vector}
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    named = str(asked.get("model") or model)
    return orjson.dumps({"object": "list", "data": entries, "model": named, "usage": usage})


def vector_of(text: bytes) -> list[float]:
    """The vector of a text."""
    numbers = struct.unpack(f"<{DIMENSIONS}i", hashlib.sha256(text).digest())
    return [number / 2**31 for number in numbers]


def _packed(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{DIMENSIONS}f", *vector)).decode()
