"""Makes a worker's part in a cluster from the settings: reads the password and the certificates of the engine.

Without `engine` this imports nothing of streamd.engine.
"""

from __future__ import annotations

import hashlib
import random
import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from streamd.api.rights import Rights
from streamd.api.streams import Streams
from streamd.config import ConfigError, Settings
from streamd.core.keys import Keys
from streamd.daemon import keyfile, logs
from streamd.daemon.shared import hash_of
from streamd.engine_url import parse_engine_urls
from streamd.files import why_unreadable
from streamd.net.runtime import Runtime
from streamd.sources import ConfigProblem

if TYPE_CHECKING:
    from streamd.core.tokens import Verifier
    from streamd.engine.cluster import Cluster
    from streamd.engine.link import LinkTerms


def cluster_of(runtime: Runtime, settings: Settings, rights: Rights, rng: random.Random) -> Cluster | None:
    """The worker's part in the cluster; None without an engine. Raises ConfigError for files that can't be used.
    Whether the engine can be reached is found out later, and is no error.
    """
    if not settings.engine:
        return None
    from streamd.engine.cluster import Cluster  # Why here: only a configured engine needs them
    from streamd.engine.key_limits import LimitedKeys

    node = settings.node or socket.gethostname()
    terms = link_terms_of(settings, runtime.hub.member)
    assert terms is not None
    limited = LimitedKeys(lambda: rights.keys, hash_of, rights.refresh, rights.lower)
    fingerprint = KeyFingerprint(rights)
    return Cluster(runtime, settings, terms, node=node, fingerprint=fingerprint, limited=limited, say=_say, rng=rng)


def link_terms_of(settings: Settings, member: str) -> LinkTerms | None:
    """The terms of all links to the engine, with the password and the certificates of now; None without an engine.
    Raises ConfigError for files that can't be used.
    """
    if not settings.engine:
        return None
    from streamd.engine.link import LinkTerms  # Why here: as above

    return LinkTerms(
        client_name=f"streamd-{member}",
        user=settings.engine_user,
        password=_password(settings),
        tls=_tls(settings),
        timeout_s=settings.engine_timeout_s,
        slow_s=min(1.0, settings.engine_timeout_s / 2),
    )


def join_cluster(runtime: Runtime, streams: Streams, cluster: Cluster) -> None:
    """Serve streams of other nodes, and serve this worker's streams for them."""
    from streamd.api.stopping import Stopping  # Why here: as above

    runtime.hub.copies = streams.seeking.cluster = cluster
    streams.seeking.stopping = Stopping(runtime, cluster, streams.stop_stream)
    runtime.sweep.on_tick.append(cluster.tick)


class KeyFingerprint:
    """A text that differs where two nodes have different keys or issuers of tokens; it tells nothing about them. Made
    once for a key file and its like: ten thousand keys take 5 ms.
    """

    def __init__(self, rights: Rights) -> None:
        self._rights = rights
        self._made: tuple[Keys | None, Verifier | None, str] | None = None

    def __call__(self) -> str:
        keys, verifier = self._rights.keys, self._rights.verifier
        if self._made is None or self._made[0] is not keys or self._made[1] is not verifier:
            ids = "\n".join(sorted(key.id for key in keys)) if keys is not None else "no key file"
            issuers = verifier.fingerprint() if verifier is not None else "no tokens"
            self._made = (keys, verifier, hashlib.blake2b(f"{ids}\n{issuers}".encode(), digest_size=8).hexdigest())
        return self._made[2]


def _say(level: str, name: str, **fields: logs.Value) -> None:
    logs.event(logs.LEVELS[level], name, **fields)


def _password(settings: Settings) -> str:
    if not settings.engine_password_file:
        return ""
    path, name = Path(settings.engine_password_file), "engine_password_file"
    try:
        text = keyfile.read(path).decode("utf-8", "replace").strip()
    except keyfile.KeyFileModeError as error:
        raise _refused(name, str(path), str(error)) from None
    except OSError as error:
        raise _refused(name, str(path), why_unreadable(path) or f"{path}: {error.strerror}") from None
    if not text or not text.isprintable():
        raise _refused(name, str(path), "must hold one password on one line")
    return text


def _tls(settings: Settings) -> ssl.SSLContext | None:
    if not parse_engine_urls(settings.engine)[0].tls:
        return None
    file = settings.engine_ca_file
    try:
        return ssl.create_default_context(cafile=file or None)
    except (OSError, ssl.SSLError) as error:
        raise _refused("engine_ca_file", file, f"{file}: {error}") from None


def _refused(key: str, value: str, why: str) -> ConfigError:
    return ConfigError([ConfigProblem("settings", key, value, why)])
