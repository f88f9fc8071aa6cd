"""The log level on the admin surface: for all requests, or step by step for a key's or a stream's, for a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from streamd.api.rights import Rights
from streamd.api.streams import JSON, query_of
from streamd.log_levels import FOR_S_MAX, LEVELS, WATCH_S, WATCHES_MAX, LevelChange, LogLevels
from streamd.net.answer import Answer
from streamd.net.application import Plan
from streamd.net.http_error import HttpError
from streamd.net.runtime import Runtime
from streamd.rows import Refused, format_duration, parse_duration

# A key's name, or the name of a stream; the longest has 128 characters.
NAME_CHARS_MAX = 256


class LogLevelRoute:
    """`change` makes a change for all workers, in a moment; `levels` are those that hold here."""

    def __init__(
        self, runtime: Runtime, rights: Rights, change: Callable[[LevelChange], None], levels: Callable[[], LogLevels]
    ) -> None:
        self._runtime = runtime
        self._rights = rights
        self._change = change
        self._levels = levels
        self.methods = {
            "GET": Plan(answer=self.show),
            "PUT": Plan(answer=self.put, keeps_body=True, body_bytes_max=64),
        }

    def show(self, answer: Answer) -> None:
        """GET /log-level: the level, and the watches with the time that is left."""
        now, levels = self._runtime.time(), self._levels()
        watches = [_shown(each._asdict(), each.until - now) for each in levels.watches]
        fields = _shown({"level": levels.level, "usual": levels.usual, "until": levels.until}, levels.until - now)
        body = orjson.dumps({**fields, "watches": watches}, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
        answer.send(200, body, [JSON])

    def put(self, answer: Answer) -> None:
        """PUT /log-level?for=…&key=…&stream=…, with the level as body. Raises HttpError 400, 404 and 409."""
        asked = query_of(answer.request)
        key, stream = self._key_id(asked.get("key", "")), asked.get("stream", "")
        if len(stream) > NAME_CHARS_MAX or (key and stream):
            raise HttpError(400, "Watch either a key or a stream; give its id or name.", code="bad_watch")
        is_watch = bool(key or stream)
        level = answer.request.body.decode("ascii", "replace").strip() or ("debug" if is_watch else "")
        if level not in LEVELS or (is_watch and level != "debug"):
            wanted = "debug, for a key or a stream" if is_watch else f"one of {', '.join(LEVELS)}"
            raise HttpError(400, f"The log level has to be {wanted}.", code="bad_log_level")
        for_s = _time(asked["for"]) if "for" in asked else WATCH_S if is_watch else 0.0
        change = LevelChange(level, for_s, key, stream)
        if not self._levels().has_room(change):
            text = f"{WATCHES_MAX} keys and streams are watched already; end a watch with for=0s, or wait."
            raise HttpError(409, text, code="too_many_watches")
        self._change(change)
        answer.send(204)

    def _key_id(self, given: str) -> str:
        """The id of the key that the operator names by id or name. Without a key file any principal's id is taken."""
        keys = self._rights.keys
        if not given or keys is None or keys.get(given) is not None:
            if len(given) > NAME_CHARS_MAX:
                raise HttpError(400, "This is no key's id or name.", code="bad_watch")
            return given
        ids = [key.id for key in keys if key.name == given]
        if not ids:
            raise HttpError(404, "No key has this id or name; `streamd keys list` shows all.", code="key_not_found")
        if len(ids) > 1:
            raise HttpError(400, f"{len(ids)} keys have this name; give an id: {', '.join(ids[:8])}.", code="bad_watch")
        return ids[0]


def _time(given: str) -> float:
    """The time of a change, 0 to FOR_S_MAX. Raises HttpError 400."""
    try:
        for_s = parse_duration(given)
    except Refused:
        for_s = -1.0
    if not 0 <= for_s <= FOR_S_MAX:
        text = f"`for` has to be a duration of at most {format_duration(FOR_S_MAX)}, such as 5m."
        raise HttpError(400, text, code="bad_duration")
    return for_s


def _shown(fields: dict[str, Any], left_s: float) -> dict[str, Any]:
    """Fields with the time that is left in place of its end; without those that are empty."""
    left = {"left_s": round(max(0.0, left_s), 1)} if fields.pop("until") else {}
    return {name: value for name, value in fields.items() if value} | left
