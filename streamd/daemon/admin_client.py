"""The client of the admin surface that the commands use: a request a connection, over a Unix socket or loopback."""

from __future__ import annotations

import http.client
import json
import socket
import urllib.parse
from collections.abc import Mapping
from typing import Any, Final

from streamd.addresses import Address

# Time limit of an answer: workers that ask each other take a second, and a drain's last second comes on top.
ANSWER_S: Final = 10.0

# The largest answer is a table of a thousand rows, of 500 B each.
ANSWER_BYTES_MAX: Final = 16 * 1024 * 1024


class AdminUnreachableError(Exception):
    """No daemon answers at the address. The text names the address and the reason."""


class AdminRefusedError(Exception):
    """The daemon answered with an error: its status, code and text."""

    def __init__(self, status: int, code: str, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.code = code


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=ANSWER_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class AdminClient:
    """Asks the daemon at an address."""

    def __init__(self, address: Address) -> None:
        self._address = address

    def ask(self, method: str, path: str, query: Mapping[str, str] | None = None, body: bytes | None = None) -> Any:
        """The JSON of the answer; None for an answer without a body. `path` is percent-encoded already.

        Raises AdminUnreachableError, and AdminRefusedError for a status of 400 or more, or an answer that is no JSON.
        """
        target = f"{path}?{urllib.parse.urlencode(query)}" if query else path
        connection = self._connection()
        try:
            connection.request(method, target, body, {"Accept": "application/json"})
            answer = connection.getresponse()
            content = answer.read(ANSWER_BYTES_MAX)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise AdminUnreachableError(f"no daemon answers at {self._shown()}: {reason}") from None
        finally:
            connection.close()
        if answer.status >= 400:
            raise _refused(answer.status, content)
        try:
            return json.loads(content) if content else None
        except ValueError:
            raise _refused(answer.status, content) from None

    def _connection(self) -> http.client.HTTPConnection:
        address = self._address
        if address.is_unix:
            return _UnixConnection(address.path)
        return http.client.HTTPConnection(address.host, address.port, timeout=ANSWER_S)

    def _shown(self) -> str:
        address = self._address
        return f"unix:{address.path}" if address.is_unix else f"{address.host}:{address.port}"


def _refused(status: int, content: bytes) -> AdminRefusedError:
    try:
        error = json.loads(content)["error"]
        return AdminRefusedError(status, str(error["code"]), str(error["message"]))
    except (ValueError, LookupError, TypeError):
        return AdminRefusedError(status, "", f"status {status}, from something that isn't streamd's admin surface")
