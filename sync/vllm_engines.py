"""Engines that users start themselves, as clients of a publisher: vLLM's server and its ``LLM``.

Both add to vLLM's four calls what makes an update safe to serve:

    before a manifest   pause: requests in flight are kept, new ones wait
    at the end          drop the KV cache, also that of requests in flight; commit; label; resume
    after a failure     resume if the engine has proven the version before it, else stay paused

After a failure the engine is asked what it holds: an update that is begun and given up at once is
answered with what can be served (``UpdateAbandonedError``). One that was just started holds random
weights, so it is paused until the first version lands.

Start vLLM with ``weight_transfer_config={"backend": "fp8rl"}`` and ``load_format="dummy"``; the
server also with ``VLLM_SERVER_DEV_MODE=1``, which opens its update routes to everybody who reaches
its port: vLLM asks for the token on ``/v1`` alone. Let it listen on loopback, or behind something
that asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import httpx

from fp8rl.sync.errors import NOTHING_TO_SERVE, EngineCallError

if TYPE_CHECKING:
    from vllm import LLM

TIMEOUT_SECONDS = 600.0
UNLABELLED = "default"  # vLLM's weight version before the first update


class _PausedEngine:
    """What both have in common: when to pause, to settle and to resume."""

    def __init__(self) -> None:
        self._publisher = ""
        self._paused = False

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Introduce a publisher; until the engine has proven a version it is paused."""
        self._publisher = str(init_info["publisher"])
        self._call("init_weight_transfer_engine", {"init_info": init_info})
        if self.weight_version() == UNLABELLED and not self._paused:
            self._pause()
            self._paused = True

    def start_weight_update(self) -> None:
        """Begin an update; what is held is served on."""
        self._call("start_weight_update", {})

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Take in a stage; or pause, apply and prove a manifest."""
        if "manifest" in update_info and not self._paused:
            self._pause()
            self._paused = True
        try:
            self._call("update_weights", {"update_info": update_info})
        except EngineCallError:
            self._settle()
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Drop the KV cache of the old weights, commit, label and resume."""
        try:
            self._drop_cache()
            self._call("finish_weight_update", {"weight_version": weight_version})
        except EngineCallError:
            self._settle()
            raise
        self._resume()
        self._paused = False

    def weight_version(self) -> str:
        """The version that the engine says it serves."""
        return UNLABELLED

    def _settle(self) -> None:
        """Resume where a version is proven to be held; pause where none is."""
        standing = self._standing()
        if NOTHING_TO_SERVE in standing and not self._paused:
            self._pause()
        elif NOTHING_TO_SERVE not in standing and self._paused:
            self._resume()
        self._paused = NOTHING_TO_SERVE in standing

    def _standing(self) -> str:
        """What the engine answers to an update that is given up."""
        abandon = {"publisher": self._publisher, "abandon": "asking what is held"}
        for method, body in (
            ("start_weight_update", {}),
            ("update_weights", {"update_info": abandon}),
        ):
            try:
                self._call(method, body)
            except EngineCallError as error:
                answer = str(error)
        return answer

    def _call(self, method: str, body: Mapping[str, Any]) -> None:
        """Make one of vLLM's calls; raises EngineCallError with what it answered."""
        raise EngineCallError(f"{type(self).__name__} cannot {method}")

    def _pause(self) -> None:
        """Serve nothing from here on, and keep what is in flight."""

    def _resume(self) -> None:
        """Serve again."""

    def _drop_cache(self) -> None:
        """Drop keys and values of the old weights, of requests in flight too."""


class HTTPEngine(_PausedEngine):
    """A vLLM server; close it, or use ``with``."""

    def __init__(
        self, url: str, *, token: str | None = None, timeout_seconds: float = TIMEOUT_SECONDS
    ) -> None:
        """``url``: http://host:port. ``token``: that of ``--api-key``."""
        super().__init__()
        headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
        self._http = httpx.Client(
            base_url=url,
            headers=headers,
            timeout=timeout_seconds,
            limits=httpx.Limits(max_keepalive_connections=0),  # an error ends vLLM's connection
        )

    def __enter__(self) -> HTTPEngine:
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connection."""
        self.close()

    def close(self) -> None:
        """Close the connection; the server goes on."""
        self._http.close()

    def weight_version(self) -> str:
        """The version that the server says it serves."""
        return str(self._request("GET", "weight_info")["weight_version"])

    def _call(self, method: str, body: Mapping[str, Any]) -> None:
        self._request("POST", method, json=dict(body) or None)

    def _pause(self) -> None:
        self._request("POST", "pause", params={"mode": "keep"})

    def _resume(self) -> None:
        self._request("POST", "resume")

    def _drop_cache(self) -> None:
        answer = self._request(
            "POST", "reset_prefix_cache", params={"reset_running_requests": "true"}
        )
        if answer.get("success") is not True:
            raise EngineCallError(f"{self._http.base_url}: its prefix cache could not be reset")

    def _request(self, verb: str, path: str, **content: Any) -> dict[str, Any]:
        where = f"{self._http.base_url.join(path)}"
        try:
            response = self._http.request(verb, f"/{path}", **content)
        except httpx.HTTPError as error:
            raise EngineCallError(f"{where} cannot be reached: {error}") from error
        if response.status_code == httpx.codes.NOT_FOUND:
            raise EngineCallError(
                f"{where} does not exist; start the server with VLLM_SERVER_DEV_MODE=1 and "
                '--weight-transfer-config \'{"backend": "fp8rl"}\''
            )
        if response.is_error:
            raise EngineCallError(f"{where} answered {response.status_code}: {response.text}")
        return dict(response.json()) if response.content else {}


class InProcessEngine(_PausedEngine):
    """A vLLM ``LLM`` of this process. Ask ``failure`` before you generate."""

    def __init__(self, llm: LLM) -> None:
        super().__init__()
        self._llm = llm
        self.failure: str | None = "no weights have been published yet"

    def _call(self, method: str, body: Mapping[str, Any]) -> None:
        arguments = dict(body)
        try:
            if method == "finish_weight_update":
                self._llm.finish_weight_update(**arguments)
            elif arguments:
                getattr(self._llm, method)(arguments)
            else:
                getattr(self._llm, method)()
        except (ValueError, RuntimeError) as error:
            raise EngineCallError(f"{type(error).__name__}: {error}") from error

    def weight_version(self) -> str:
        """The version that the engine says it serves."""
        return str(self._llm.get_weight_version())

    def _pause(self) -> None:
        self.failure = "an update is under way, or failed and could not be undone; publish"

    def _resume(self) -> None:
        self.failure = None

    def _drop_cache(self) -> None:
        if not self._llm.reset_prefix_cache(reset_running_requests=True):
            raise EngineCallError("vLLM could not reset its prefix cache")
