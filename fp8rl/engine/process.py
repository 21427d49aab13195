"""The rollout engine's own process: the real vLLM behind one socket.

The trainer starts ``python -m fp8rl.engine.process FD PID`` and talks JSON lines over an inherited
socket: one request, one reply, in order. The first line carries the ``LLM`` arguments. What a
request does is in ``server.py``; here is the loop: a request that waits is answered first,
and while none waits the engine is stepped. The process ends when the socket closes or its parent
dies. Errors that no request can cause, those of a step among them, end it too, loudly: its log says
why and the trainer is told at once.
"""

from __future__ import annotations

import json
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

from fp8rl.engine.server import EngineServer
from fp8rl.lifeline import end_with_parent

CHUNK = 1 << 20  # bytes taken from the socket at once


class Lines:
    """Whole lines from a socket, which can also say that none waits.

    A file made from the socket cannot: bytes that lie in its buffer never wake ``select``.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = b""

    def read(self, *, wait: bool) -> bytes | None:
        """The next line; b"" once the other end has closed; None if none waits and we do not."""
        while b"\n" not in self._buffer:
            if not wait and not select.select([self._connection], [], [], 0)[0]:
                return None
            chunk = self._connection.recv(CHUNK)
            if not chunk:
                return b""
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line + b"\n"


def serve(connection: socket.socket, start: Callable[[dict[str, Any]], EngineServer]) -> None:
    """Answer requests, and step the engine between them, until the trainer closes its end."""
    lines = Lines(connection)
    first = lines.read(wait=True)
    if not first:
        return
    server = start(json.loads(first))
    _reply(connection, server.description())
    while (line := lines.read(wait=not server.busy)) != b"":
        if line is None:
            server.step()
        else:
            _reply(connection, _answer(server, json.loads(line)))


def _answer(server: EngineServer, request: dict[str, Any]) -> dict[str, Any]:
    if request["method"] == "collect":
        while server.runs(request["params"]["ticket"]):
            server.step()
    method: Callable[..., Any] = getattr(server, request["method"])
    try:
        return {"result": method(**request["params"])}
    except (ValueError, RuntimeError) as error:  # what a request can cause; others end us
        return {"error": type(error).__name__, "message": str(error)}


def _reply(connection: socket.socket, reply: dict[str, Any]) -> None:
    connection.sendall(json.dumps(reply).encode() + b"\n")


def main(start: Callable[[dict[str, Any]], EngineServer] = EngineServer) -> None:
    """Serve on a socket; the arguments are its file descriptor and the trainer's process id."""
    descriptor, parent = map(int, sys.argv[1:])
    end_with_parent(parent, signal.SIGKILL)
    serve(socket.socket(fileno=descriptor), start)


if __name__ == "__main__":
    main()
