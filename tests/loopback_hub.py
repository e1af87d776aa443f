"""A Hugging Face Hub on 127.0.0.1 for tests: the real client talks to it, and it misbehaves on demand."""

from __future__ import annotations

import re
import threading
import traceback
from typing import Any
from urllib.parse import unquote

from loopback_hub_http import FAULTS, Answer, Exchange, Fault, HubServer
from loopback_hub_routes import Call
from loopback_hub_store import HubError, Repo

__all__ = ["LoopbackHub"]


class LoopbackHub:
    """The Hub; a context manager.

    Args:
        token: The only valid bearer token; it may read everything and write to `user`'s repositories.
        user: Name behind the token.
        part_size: Bytes; larger LFS files are uploaded in parts of this size.

    Attributes:
        url: Address for HF_ENDPOINT.
        cdn_url: Address, of another origin, that large files come from and go to.
        repos: Repositories by id.
        namespaces: Users and organisations that the token may write to.
        log: Every request, with its headers.
        unknown: Requests that nothing here answers, and errors of this server; empty in a sound test.
        env: Variables for subprocesses that use this Hub; the fixture `hub` fills it.
        waits: Seconds that the client wanted to sleep between retries; the fixture `hub` fills it.
    """

    def __init__(self, token: str = "hf_loopback", user: str = "me", part_size: int = 5 * 2**20):
        self.token, self.user, self.part_size = token, user, part_size
        self.namespaces = {user}
        self.repos: dict[str, Repo] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.log: list[Exchange] = []
        self.unknown: list[str] = []
        self.env: dict[str, str] = {}
        self.waits: list[float] = []
        self.closing = threading.Event()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._servers = [HubServer(self, cdn=False), HubServer(self, cdn=True)]
        self.url, self.cdn_url = (server.url for server in self._servers)

    def __enter__(self) -> LoopbackHub:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add_repo(
        self, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False, gated: bool = False
    ) -> Repo:
        """Make a repository.

        Args:
            repo_id: With or without a namespace; data sets with the prefix `datasets/`.
            files: Contents by path.
            private: Invisible without the token.
            gated: Its files are refused to everybody.
        """
        repo = self.repos[repo_id] = Repo(repo_id, private, gated)
        if files:
            repo.commit(files, message="files")
        return repo

    def inject(self, match: str, kind: str, times: int = 1, **details: Any) -> Fault:
        """Spoil the next `times` requests whose "METHOD /path" contains the pattern; then behave again.

        Faults of an answer's body (`truncate`, `corrupt`, and `drop`, `reset` and `stall` part-way) pass over
        requests without one, such as HEAD and redirects.

        Args:
            match: Regular expression; the addresses of the CDN contain those of the Hub.
            kind: `drop` closes the connection, for uploads while the body comes in; `reset` the same with a TCP
                reset; `lose` does what was asked but closes instead of answering; `status` answers with an error;
                `truncate` sends a shorter body and says so; `corrupt` changes one byte; `stall` waits.
            times: How often.
            details: `after`, `status`, `retry_after`, `code`, `seconds` of Fault.

        Returns:
            The fault, which counts in `fired`.
        """
        if kind not in FAULTS:
            raise ValueError(f"kind: must be one of {', '.join(FAULTS)}, got {kind!r}")
        self._faults.append(Fault(re.compile(match), kind, times, **details))
        return self._faults[-1]

    @property
    def fired(self) -> int:
        """How often a fault has spoilt a request."""
        return sum(fault.fired for fault in self._faults)

    @property
    def requests(self) -> list[tuple[str, str, int]]:
        """(method, unquoted path with query, status) of every request; status 0: no answer."""
        return [(one.method, one.path, one.status) for one in self.log]

    def matching(self, pattern: str) -> list[Exchange]:
        """Requests whose "METHOD /path" contains the pattern."""
        return [one for one in list(self.log) if re.search(pattern, f"{one.method} {one.path}")]

    def take(self, request: str, *kinds: str, before_body: bool = False) -> Fault | None:
        """The fault that spoils this request, counted down; called by the server."""
        with self._lock:
            for fault in self._faults:
                early = fault.kind == "stall" and fault.after is None
                if fault.times > 0 and fault.kind in kinds and early == before_body and fault.match.search(request):
                    fault.times -= 1
                    fault.fired += 1
                    return fault
        return None

    def answer(self, method: str, path: str, headers: Any, body: bytes, cdn: bool) -> Answer:
        """The answer of the routes; called by the server."""
        try:
            found = Call(self, method, path, headers, body).run() if path.startswith("/cdn/") == cdn else None
        except HubError as error:
            return Answer.of_error(error)
        except Exception:
            self.unknown.append(f"{method} {unquote(path)}: {traceback.format_exc()}")
            return Answer.of_error(HubError(500, "The loopback Hub failed"))
        if found is None:
            self.unknown.append(f"{method} {unquote(path)}")
            return Answer.of_error(HubError(501, f"The loopback Hub does not know {method} {unquote(path)}"))
        return found
