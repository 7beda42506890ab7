"""A small Hub on this machine, for tests: huggingface_hub's own client reads from it and pushes.

    with HubServer() as hub:
        hub.add("org/name", "folder")
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        streammap.open("org/name")

It serves folders as repositories (models only), with commits, branches, tokens, private and gated
ones, counts what it sends, and can be as bad as a network: see Faults. Xet is not spoken; a client
that pushes needs HF_HUB_DISABLE_XET=1.
"""

import threading
from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import final

from streammap.testing import hubrepos
from streammap.testing.hubhandler import Handler
from streammap.testing.hubrepos import Repo
from streammap.testing.hubstate import Faults, HubState, Ledger, Seen

__all__ = ["Faults", "HubServer", "Seen"]


@final
class HubServer:
    """A Hub on a port of this machine. Use as a context."""

    def __init__(self, *, tokens: Mapping[str, str] | None = None, redirects: bool = False) -> None:
        """Serve nothing yet.

        Args:
            tokens: Token -> user; anybody is let in without one.
            redirects: Whether files are sent from another address, which a redirect leads to and
                which takes no token, as the Hub's storage does.
        """
        self._state = HubState(dict(tokens or {"hf_test": "tester"}), redirects)
        self._server = _Server(("127.0.0.1", 0), Handler)
        self._state.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._server.hub = self._state
        self._thread = threading.Thread(target=self._serve, name="hub-server", daemon=True)

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT must be."""
        return self._state.url

    @property
    def repos(self) -> dict[str, Repo]:
        """The repositories by their names."""
        return self._state.repos

    @property
    def faults(self) -> Faults:
        """How the server fails on purpose; to be changed at will."""
        return self._state.faults

    def redirect(self) -> None:
        """Send weights from another address from now on."""
        self._state.redirects = True

    def let_in(self, user: str, name: str) -> None:
        """Let a user read a gated repository."""
        self._state.lets_in.add((user, name))

    def add(
        self,
        name: str,
        folder: str | Path,
        *,
        revision: str = "main",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Serve a folder as a revision of a repository; gives its commit."""
        repo = self.repos.setdefault(name, Repo(name))
        repo.private, repo.gated = private, gated
        return repo.commit(hubrepos.of_folder(Path(folder)), revision)

    def content(self, name: str, *, revision: str = "main") -> dict[str, bytes]:
        """All files of a repository's revision."""
        files = self.repos[name].files(revision)
        return {file: blob.read(0, blob.nbytes) for file, blob in files.items()}

    @property
    def seen(self) -> tuple[Seen, ...]:
        """The requests so far."""
        return tuple(self._state.ledger.seen)

    @property
    def nbytes_sent(self) -> int:
        """Bytes of all answers' bodies so far."""
        return sum(seen.nbytes for seen in self._state.ledger.seen)

    def forget(self) -> None:
        """Begin to count anew."""
        self._state.ledger = Ledger()

    def _serve(self) -> None:
        self._server.serve_forever(poll_interval=0.02)


class _Server(ThreadingHTTPServer):
    """Knows its hub; a client that hangs up is no error of ours."""

    daemon_threads = True
    hub: HubState

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing."""
