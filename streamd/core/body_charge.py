"""BodyCharge: a request's body in the books.

It goes with the bytes, from the connection that reads them to the exchange that may have to send them again, and is
released when they are dropped.
"""

from __future__ import annotations

from streamd.core.admission import Admission
from streamd.core.bodies import Holders
from streamd.core.refusal import Refusal


class BodyCharge:
    """The bytes that are charged for a body, to these holders."""

    __slots__ = ("_admission", "_holders", "held_bytes")

    def __init__(self, admission: Admission, holders: Holders) -> None:
        self._admission = admission
        self._holders = holders
        self.held_bytes = 0

    def resize(self, size_bytes: int) -> Refusal | None:
        """The body takes `size_bytes` from now on. A refusal leaves the charge as it is; less is never refused."""
        more_bytes = size_bytes - self.held_bytes
        if more_bytes > 0:
            refusal = self._admission.admit_body(more_bytes, self._holders)
            if refusal is not None:
                return refusal
        elif more_bytes < 0:
            self._admission.release_body(-more_bytes, self._holders)
        self.held_bytes = size_bytes
        return None

    def adopt(self, size_bytes: int) -> None:
        """Bytes that another process has admitted are here from now on."""
        self._admission.adopt_body(size_bytes, self._holders)
        self.held_bytes += size_bytes

    def release(self) -> None:
        """The bytes are gone. Further calls do nothing."""
        self.resize(0)
