"""The mock's text: readable, endless, the same for the same seed, and recognizable as a mock's by its first words.

Tokens are kept as the JSON-escaped inside of a string, the only form in which a stream needs them. The corpus has the
characters of real text that may trip a relay: quotes, backslashes, newlines, and characters of two to four bytes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from itertools import islice
from typing import Final

import orjson

OPENING: Final = "This is mock-llm speaking, a synthetic upstream: no model was asked."

SENTENCES: Final = (
    "A token is a small thing, and it costs a little money each time.",
    "The reader leans in, the cursor blinks, and one more word arrives.",
    "Somewhere a queue fills up; somewhere else a reader walks away.",
    "The river does not wait for the slowest boat.",
    'She wrote "send it once, and only once" on the whiteboard and underlined it twice.',
    "Between the café and the Straße there is a small, naïve clock.",
    "A path such as C:\\logs\\today is no place for a secret.",
    "Nothing is lost in silence: what is missing is named.",
    "日本語の文も、少しずつ届きます。",
    "The ship sails at dawn 🚀 with ten thousand passengers and one lighthouse.",
    "First comes the head, then the events, then the end.\n\n",
    "Пусть каждый байт дойдёт целым.",
    "If the wind drops, the sails hang; if the upstream stalls, the heartbeat goes on.",
    "A good log remembers the last word and forgets the weather.",
    "Here is a list:\n- one reader,\n- one stream,\n- one gap, honestly announced.\n\n",
    "Patience is a buffer with a number and a comment that says where it came from.",
    "The bridge is long, the trucks are many, and each one carries a single letter.",
    "Half a character is worse than none; 👩‍💻 knows that well.",
    "Whoever comes late reads faster until the present is reached.",
    "And so the story goes on, word by word, until the count is full.",
)

# A token as tokenizers make it: a word with the blank before it, or a run of other characters.
_TOKEN: Final = re.compile(r" ?\w+|[^\w\s]+|\s+")

_STAMP: Final = b"@%d "


def _escape(text: str) -> bytes:
    return orjson.dumps(text)[1:-1]


def _tokenize(sentence: str) -> tuple[bytes, ...]:
    return tuple(_escape(token) for token in _TOKEN.findall(sentence))


_OPENING_TOKENS: Final = _tokenize(OPENING)
_SENTENCE_TOKENS: Final = tuple(_tokenize(" " + sentence) for sentence in SENTENCES)


def _endless(seed: int) -> Iterator[bytes]:
    yield from _OPENING_TOKENS
    state = seed & 0x7FFFFFFF
    while True:
        state = (state * 1103515245 + 12345) & 0x7FFFFFFF  # the constants of C's rand(), which are good enough here
        yield from _SENTENCE_TOKENS[(state >> 8) % len(_SENTENCE_TOKENS)]


def tokens(seed: int, count: int) -> Iterator[bytes]:
    """The first `count` tokens of the text of `seed`, each as the inside of a JSON string."""
    return islice(_endless(seed), count)


def stamps(count: int) -> Iterator[bytes]:
    """`count` tokens, each the monotonic clock in ns when it is taken (`@<ns> `), so that a reader knows its age."""
    for _ in range(count):
        yield _STAMP % time.monotonic_ns()


def unescape(pieces: Iterator[bytes]) -> str:
    """The whole text of these tokens."""
    return str(orjson.loads(b'"' + b"".join(pieces) + b'"'))


def text(seed: int, count: int) -> str:
    """The same tokens as `tokens(seed, count)`, as a single text."""
    return unescape(tokens(seed, count))


def pieces(whole: str, size: int) -> Iterator[bytes]:
    """`whole` in pieces of `size` characters, each as the inside of a JSON string, as tool-call arguments are sent."""
    return (_escape(whole[at : at + size]) for at in range(0, len(whole), size))
