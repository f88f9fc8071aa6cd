"""Terms: the rules of a stream, set once when it opens from its request and the settings of that moment."""

from __future__ import annotations

from dataclasses import dataclass

from streamd.core.limits import Account
from streamd.core.write_interval import WriteInterval
from streamd.policy import Policy


# Why not frozen: setting the fields of a frozen object takes four times as long, for each stream. Nobody changes terms.
@dataclass(slots=True)
class Terms:
    """The rules hold until the stream is removed; a reload changes only later streams."""

    owner: str = ""  # the principal that opened it
    account: Account | None = None  # of the principal's key
    pays_tokens: bool = True  # False for an answer that the upstream keeps and gives out again: it was paid for once
    name_public: bool = False
    published: bool = False  # by an application: its source isn't an upstream, and it holds no drain open
    is_copy: bool = False  # another process owns the stream, and has the truth about it: this follows it
    model: str = ""
    policy: Policy = Policy.COALESCE
    catchup_bytes_max: int = 16 * 1024
    detach_grace_s: float = 0.0
    resume_grace_s: float = 0.0
    retention_s: float = 0.0
    write_interval: WriteInterval = WriteInterval()
