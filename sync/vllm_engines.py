"""Engines that users start themselves, as clients of a publisher: vLLM's server and its ``LLM``.

Both add to vLLM's four calls what makes an update safe to serve:

    after every call    ask every worker whether it refused (``worker_extension.py``)
    before a manifest   pause: requests in flight are kept, new ones wait
    at the end          drop the KV cache, also that of requests in flight; commit; label; resume
    after a failure     resume if every worker has proven the version before it, else stay paused

An engine that was just started holds random weights, so it is paused until the first version lands.
Start vLLM with ``load_format="dummy"``, ``weight_transfer_config={"backend": "fp8rl"}`` and
``worker_extension_cls="fp8rl.sync.worker_extension.WorkerExtension"``; the server also with
``VLLM_SERVER_DEV_MODE=1``, which opens its update routes to everybody who reaches its port: vLLM
asks for the token on ``/v1`` alone. Let it listen on loopback, or behind something that asks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import httpx

from fp8rl.sync.errors import EngineCallError, UpdateRefusedError
from fp8rl.sync.worker_extension import EXTENSION

if TYPE_CHECKING:
    from vllm import LLM

TIMEOUT_SECONDS = 600.0


class _PausedEngine(ABC):
    """What both have in common: when to ask, to pause and to resume."""

    def __init__(self) -> None:
        self._publisher = ""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Introduce a publisher; until the engine has proven a version it is paused."""
        self._publisher = str(init_info["publisher"])
        self._call("init_weight_transfer_engine", {"init_info": init_info})
        if any(worker["session"] for worker in self._reports()):
            self._end_session("another publisher took over")
        self._settle()
        self._end_if_refused()

    def start_weight_update(self) -> None:
        """Begin an update; what is held is served on."""
        self._call("start_weight_update", {})
        self._end_if_refused()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Take in a stage; or pause, apply and prove a manifest; or give the update up."""
        if "abandon" in update_info:
            self._end_session(update_info["abandon"])
            self._settle()
            return
        if "manifest" in update_info:
            self._pause()
        self._call("update_weights", {"update_info": update_info})
        self._end_if_refused()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Drop the KV cache of the old weights, commit, label and resume."""
        self._end_if_refused("unready")
        self._drop_cache()
        self._call("finish_weight_update", {"weight_version": weight_version})
        self._settle()

    def _end_if_refused(self, problem: str = "refusal") -> None:
        """End the update in every worker where one of them refused it, and raise that."""
        for worker in self._reports():
            if worker[problem] is not None:
                self._end_session(worker[problem])
                self._settle()
                raise UpdateRefusedError(worker[problem])

    def _end_session(self, reason: str) -> None:
        """Have every worker undo what it applied, and end vLLM's session."""
        if not any(worker["session"] for worker in self._reports()):
            return
        info = {"publisher": self._publisher, "abandon": reason}
        self._call("update_weights", {"update_info": info})
        self._call("finish_weight_update", {"weight_version": None})

    def _settle(self) -> None:
        """Serve where every worker has proven what it holds; else pause."""
        if all(worker["failure"] is None for worker in self._reports()):
            self._resume()
        else:
            self._pause()

    @abstractmethod
    def _reports(self) -> list[dict[str, Any]]:
        """What each worker holds, and says of the last call."""

    @abstractmethod
    def _call(self, method: str, body: Mapping[str, Any]) -> None:
        """Make one of vLLM's calls; raises EngineCallError with what it answered."""

    @abstractmethod
    def _pause(self) -> None:
        """Serve nothing from here on, and keep what is in flight; again changes nothing."""

    @abstractmethod
    def _resume(self) -> None:
        """Serve again."""

    @abstractmethod
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

    def _reports(self) -> list[dict[str, Any]]:
        try:
            answer = self._request("POST", "collective_rpc", json={"method": "fp8rl_report"})
        except EngineCallError as error:
            raise EngineCallError(
                f"the workers cannot be asked what they hold; start the server with "
                f"--worker-extension-cls {EXTENSION}: {error}"
            ) from error
        reports: list[dict[str, Any]] = answer["results"]
        return reports

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

    def _reports(self) -> list[dict[str, Any]]:
        try:
            reports: list[dict[str, Any]] = self._llm.collective_rpc("fp8rl_report")
        except AttributeError as error:
            raise EngineCallError(
                f"the workers cannot be asked what they hold; start the LLM with "
                f"worker_extension_cls={EXTENSION!r}: {error}"
            ) from error
        return reports

    def _pause(self) -> None:
        failures = [worker["failure"] for worker in self._reports()]
        self.failure = next(filter(None, failures), "an update is under way")

    def _resume(self) -> None:
        self.failure = None

    def _drop_cache(self) -> None:
        if not self._llm.reset_prefix_cache(reset_running_requests=True):
            raise EngineCallError("vLLM could not reset its prefix cache")
