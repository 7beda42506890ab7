"""A small Hub on this machine, for tests: huggingface_hub's own client reads from it and pushes.

    with HubServer() as hub:
        hub.add("org/name", "folder")
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        streammap.open("org/name")

It serves folders as model repositories, private and gated ones too, with commits, branches and
tokens. It counts what it sends, and can fail like a network: see Faults. It does not speak Xet; a
client that pushes needs HF_HUB_DISABLE_XET=1.
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
            tokens: Token -> user. Public repositories need no token.
            redirects: Whether weights are sent from another address, through a redirect; tokens are
                refused there, as by the Hub's storage.
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
        """The value for HF_ENDPOINT."""
        return self._state.url

    @property
    def repos(self) -> dict[str, Repo]:
        """The repositories by name."""
        return self._state.repos

    @property
    def faults(self) -> Faults:
        """How the server fails on purpose; change it at any time."""
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
        """Serve a folder as a revision of a repository; returns the commit id."""
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
        """Reset `seen` and `nbytes_sent`."""
        self._state.ledger = Ledger()

    def _serve(self) -> None:
        self._server.serve_forever(poll_interval=0.02)


class _Server(ThreadingHTTPServer):
    """Knows its hub; clients that hang up are ignored."""

    daemon_threads = True
    hub: HubState

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing."""
