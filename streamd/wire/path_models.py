"""The model that a path names outside of Google's API: `/v1/models/{model}`, `/v1/engines/{model}/completions`, and
the longer paths of Vertex (`/v1/projects/…/models/{model}:predict`) and Bedrock (`/v1/model/{model}/invoke`).

Which paths of an upstream take a model isn't known here, so each form that servers of OpenAI's API have is read, in any
case, and an ending that isn't known counts to the name: a right is then refused rather than granted by mistake.

SDKs write a slash in a name as `%2F`, which a path may hold nowhere else (`climbs`).
"""

from __future__ import annotations

import functools
import re
from typing import Final
from urllib.parse import quote, unquote

_NAMED: Final = re.compile(r"/v1(?:beta)?/(?:[^/]+/)*?(?:models?|engines|deployments)/(.+)", re.IGNORECASE | re.DOTALL)
# What a server does with a model, behind its name.
_ACTION: Final = re.compile(
    r"(?:/(?:chat/completions|completions|embeddings|edits|generate|search|load|unload|cancel"
    r"|invoke|invoke-with-response-stream|converse|converse-stream)"
    r"|:(?:generateContent|streamGenerateContent|countTokens|embedContent|batchEmbedContents"
    r"|predict|rawPredict|streamRawPredict|serverStreamingPredict))/*\Z",
    re.IGNORECASE,
)
# Paths whose readings are remembered: those of requests for answers are a dozen, and a path has 8 KiB at most.
PATHS_KNOWN_MAX: Final = 64

# A path that is decoded twice on its way names another model at each time.
_DECODED_MAX: Final = 3

# Parts that a client's path must not hold, so that it can't leave the upstream's base: dot segments, empty segments,
# and sequences that a server behind could decode into such a segment.
_climbs = re.compile(r"//|/\.{1,2}(?:/|\Z)|\\|%2e|%5c|%00", re.IGNORECASE).search
_SLASH: Final = re.compile(r"%2f", re.IGNORECASE)
# Where a slash may be encoded: behind a plain name of such a segment, so that decoding it changes no other segment.
_MAY_HOLD_SLASH: Final = re.compile(
    r"/v1(?:beta)?/(?:[^/%]+/)*?(?:models?|tunedModels|engines|deployments)/[^/].*", re.DOTALL
)


@functools.lru_cache(PATHS_KNOWN_MAX)
def climbs(path: str) -> bool:
    """Whether a path could lead out of the upstream's base, or to another route there than here."""
    if _climbs(path):
        return True
    plain = _SLASH.sub("/", path)
    return plain != path and (_MAY_HOLD_SLASH.fullmatch(path) is None or _climbs(plain) is not None)


@functools.lru_cache(PATHS_KNOWN_MAX)
def models_in_path(path: str) -> tuple[str, ...]:
    """The model that a path names, once for each way in which it may be decoded; empty if it names none."""
    found: dict[str, None] = {}
    for _ in range(_DECODED_MAX):
        named = _NAMED.fullmatch(path)
        if named is not None:
            found[_ACTION.sub("", named[1]).rstrip("/")] = None
        path = unquote(path)
    return tuple(found)


@functools.lru_cache(PATHS_KNOWN_MAX)
def model_in_path(path: str) -> str:
    """The model that a path names to a server, which decodes it once; "" if it names none."""
    named = _NAMED.fullmatch(path)
    return "" if named is None else unquote(_ACTION.sub("", named[1]).rstrip("/"))


def with_model(path: str, model: str) -> str:
    """The path with another model in its place, written as the SDKs write it; unchanged if it names none."""
    named = _NAMED.fullmatch(path)
    if named is None:
        return path
    rest = named[1][len(_ACTION.sub("", named[1]).rstrip("/")) :]
    return path[: named.start(1)] + quote(model, safe=":@") + rest
