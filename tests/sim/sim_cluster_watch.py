"""The simulation's view into streamd/engine: counted situations, and the moment of a declaration.

A search fails when a situation of the table was never reached, as in sim_watch.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sim_faults import FAULTS
from sim_loop import Violation

from streamd.core.stream import Stream
from streamd.engine.follow import Follow, FollowState
from streamd.engine.link import Link, LinkState
from streamd.engine.members import Members
from streamd.engine.owner import CopyFound, CopyOwner, CopyState, OwnedCopy

if TYPE_CHECKING:
    from sim_cluster import SimCluster

CLUSTER_SITUATIONS = (
    *(f"the engine: {topology}" for topology in ("a single server", "two shards", "sentinels")),
    *(f"fault: {name}" for name in FAULTS),
    "a connection is cut in the middle of a command",
    "a connection is cut in the middle of a reply",
    "a message is lost",
    "a split brain",
    "a quiet cluster is checked",
    # the states of copies, follows and links. YIELDED comes with topics that change their owner
    *(f"a copy becomes {state.value}" for state in CopyState if state is not CopyState.YIELDED),
    *(f"a follow becomes {state.value}" for state in FollowState if state is not FollowState.SUBSCRIBING),
    *(f"a link becomes {state.value}" for state in LinkState),
    # looks at copies; an entry that is none of streamd's has no writer here
    *(f"a look finds: {found.value}" for found in CopyFound if found is not CopyFound.BROKEN),
    "a write is refused: the engine is full",
    "a write is refused: its id isn't the next",
    "a write is refused: the copy is gone",
    "a copy is taken back by an owner that was declared lost",
    # followers
    "a stream is looked for",
    "a push continues the log",
    "a push is old",
    "a push doesn't continue the log",
    "a message waits for a read",
    "a copy is read from its first entry again",
    "a log is replaced under its readers",
    "a copy is shorter than what its readers have",
    "a death is declared",
    "a declaration is refused: another was first",
    "a stream that its owner has no more is declared lost",
    "a copy is lost, and its owner has nothing to write",
    "a member is found lost",
    "copies may be missing",
    # readers
    "a gap is told",
    "reconnect is told",
    "a reader is ahead of the copy",
    "a reader is ahead of the end",
    "a living owner's reader is told of its loss",
    "a reader of a lost stream goes on",
    "204: the reader knows of the loss",
    "410",
    "503 engine_unreachable",
    "503 engine_behind",
    "a reader has all",
    "a reader lost",
    "a reader leaves",
    # lines of the log
    *(f"line: {name}" for name in ("engine up", "engine slow", "engine down", "engine healed")),
)


class ClusterWatch:
    """The wrapped methods of a run; `remove()` puts the originals back."""

    def __init__(self, world: SimCluster) -> None:
        self.world = world
        self.seen = world.seen
        self._originals: list[tuple[Any, str, Any]] = []
        self._around(CopyOwner, "_go", self._copy_goes)
        self._around(CopyOwner, "_judge", self._look_finds)
        self._around(CopyOwner, "_written", self._written)
        self._around(Follow, "_go", self._follow_goes)
        self._around(Follow, "_take", self._take)
        self._around(Follow, "_keep", self._keep)
        self._around(Follow, "_rebuild_soon", self._rebuild_soon)
        self._around(Follow, "_build", self._build)
        self._around(Follow, "declare_lost", self._declare_lost)
        self._around(Follow, "_declared", self._declared)
        self._around(Link, "_go", self._link_goes)
        self._around(Stream, "replace_log", self._replace_log)
        self._around(Members, "is_lost", self._is_lost)
        self._around(Members, "may_lack_copies", self._may_lack_copies)

    def _around(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        original, failed = getattr(owner, name), self.world.loop.failed
        self._originals.append((owner, name, original))

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            try:
                return wrapper(original, *args, **kwargs)
            except Violation as violation:
                failed.append(violation)  # the code under test may catch it
                raise

        setattr(owner, name, wrapped)

    def remove(self) -> None:
        for owner, name, original in reversed(self._originals):
            setattr(owner, name, original)
        self._originals.clear()

    # -- owners

    def _copy_goes(self, original: Any, owner: CopyOwner, copy: OwnedCopy, state: CopyState) -> None:
        if state is not copy.state:
            self.seen[f"a copy becomes {state.value}"] += 1
        original(owner, copy, state)

    def _look_finds(self, original: Any, owner: CopyOwner, copy: OwnedCopy, found: CopyFound, **options: Any) -> None:
        self.seen[f"a look finds: {found.value}"] += 1
        original(owner, copy, found, **options)

    def _written(self, original: Any, owner: CopyOwner, *args: Any) -> None:
        counts = owner.counts
        before = (counts.refused_full, counts.refused_order, counts.refused_gone, counts.revived)
        original(owner, *args)
        after = (counts.refused_full, counts.refused_order, counts.refused_gone, counts.revived)
        for name, was, now in zip(
            (
                "a write is refused: the engine is full",
                "a write is refused: its id isn't the next",
                "a write is refused: the copy is gone",
                "a copy is taken back by an owner that was declared lost",
            ),
            before,
            after,
            strict=True,
        ):
            self.seen[name] += now - was

    # -- follows

    def _follow_goes(self, original: Any, follow: Follow, state: FollowState) -> None:
        if state is not follow.state:
            self.seen[f"a follow becomes {state.value}"] += 1
        original(follow, state)

    def _take(self, original: Any, follow: Follow, message: Any) -> bool:
        counts = follow._counts
        old, holes, pushes = counts.pushes_old, counts.holes, counts.pushes
        taken = bool(original(follow, message))
        self.seen["a push is old"] += counts.pushes_old - old
        self.seen["a push doesn't continue the log"] += counts.holes - holes
        self.seen["a push continues the log"] += counts.pushes - pushes
        return taken

    def _keep(self, original: Any, follow: Follow, message: Any) -> None:
        self.seen["a message waits for a read"] += 1
        original(follow, message)

    def _rebuild_soon(self, original: Any, follow: Follow) -> None:
        self.seen["a copy is read from its first entry again"] += 1
        original(follow)

    def _build(self, original: Any, follow: Follow, *args: Any) -> None:
        original(follow, *args)
        if follow.stream is not None and follow.state is FollowState.LOOKING:
            self.seen["a copy is shorter than what its readers have"] += 1

    def _replace_log(self, original: Any, stream: Stream, *args: Any) -> None:
        self.seen["a log is replaced under its readers"] += 1
        original(stream, *args)

    def _declare_lost(self, original: Any, follow: Follow, by: str) -> None:
        original(follow, by)
        if follow._is_reading and follow.state is FollowState.LOOKING:
            node = self.world.node_of(by)
            if node is not None:
                self.world.declares(node, follow)

    def _declared(self, original: Any, follow: Follow, position: Any, reply: Any) -> None:
        self.seen["a declaration is refused: another was first"] += "equal or smaller" in str(reply)
        original(follow, position, reply)

    # -- members and links

    def _link_goes(self, original: Any, link: Link, state: LinkState) -> None:
        self.seen[f"a link becomes {state.value}"] += 1
        original(link, state)

    def _is_lost(self, original: Any, members: Members, *args: Any) -> bool:
        lost = bool(original(members, *args))
        self.seen["a member is found lost"] += lost
        return lost

    def _may_lack_copies(self, original: Any, members: Members, *args: Any) -> bool:
        unsure = bool(original(members, *args))
        self.seen["copies may be missing"] += unsure
        return unsure
