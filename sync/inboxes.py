"""Opens the engine's side of whichever transport a trainer introduces."""

from __future__ import annotations

from fp8rl.sync.broadcast import BroadcastInbox
from fp8rl.sync.files import FilesInbox
from fp8rl.sync.shm import ShmInbox
from fp8rl.sync.transport import BroadcastIntroduction, Inbox, Introduction, ShmIntroduction


def open_inbox(introduction: Introduction, worker: int) -> Inbox:
    """Open it for the engine's worker of that rank; TransportError where it cannot be."""
    if isinstance(introduction, ShmIntroduction):
        return ShmInbox(introduction)
    if isinstance(introduction, BroadcastIntroduction):
        return BroadcastInbox(introduction, worker)
    return FilesInbox(introduction)
