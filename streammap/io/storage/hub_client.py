"""Everything asked of huggingface_hub, and its errors as ours.

The client's own session, headers, tokens and cache are used, through its public API.
"""

import importlib
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, final

from streammap.common.units import format_nbytes
from streammap.common.version import VERSION
from streammap.errors import CheckpointError
from streammap.io.storage.retry import TransientError, patiently

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TIMEOUT_SECONDS = 30.0
"""How long a connection may be silent."""
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_LOOKED_FOR = (
    "config.json",
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_Result = TypeVar("_Result")


def endpoint() -> str:
    """The Hub's address: HF_ENDPOINT as it is now, or the client's setting."""
    from huggingface_hub import constants

    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def cache_folder() -> Path:
    """The Hub's cache: HF_HUB_CACHE as it is now, or the client's setting."""
    from huggingface_hub import constants

    return Path(os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE).expanduser()


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE is set, now or when the client was imported."""
    from huggingface_hub import constants

    is_set = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return is_set or bool(constants.HF_HUB_OFFLINE)


@final
class Client:
    """Requests about one repository."""

    def __init__(self, repo: str, cancelled: threading.Event) -> None:
        """Connect to nothing yet."""
        self.repo, self.cancelled = repo, cancelled

    def __reduce__(self) -> tuple[type["Client"], tuple[str, threading.Event]]:
        return Client, (self.repo, self.cancelled)  # no headers: a token stays where it is

    @cached_property
    def api(self) -> "HfApi":
        """The client's own."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=endpoint(), library_name="streammap", library_version=VERSION)

    @cached_property
    def headers(self) -> dict[str, str]:
        """Headers of each request: the token and the user agent."""
        headers = _utils().build_hf_headers(library_name="streammap", library_version=VERSION)
        return {**headers, "Accept-Encoding": "identity"}

    def url(self, name: str, commit: str) -> str:
        """Where a file can be fetched."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, name, revision=commit, endpoint=endpoint())

    def cached(self, name: str, commit: str) -> Path | None:
        """Where a file is in the cache."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.repo, name, revision=commit, cache_dir=cache_folder())
        return Path(path) if isinstance(path, str) else None

    def snapshot(self, revision: str) -> Path | None:
        """The folder of a revision in the cache."""
        for name in _LOOKED_FOR:
            path = self.cached(name, revision)
            if path is not None:
                return path.parent
        return None

    def download(self, name: str, revision: str) -> Path:
        """Fetch a file into the cache with the client's own download.

        Raises:
            CheckpointError: it can't be fetched.
        """
        from huggingface_hub import hf_hub_download

        return Path(
            self.patiently(
                lambda: hf_hub_download(
                    self.repo,
                    name,
                    revision=revision,
                    cache_dir=cache_folder(),
                    endpoint=endpoint(),
                    library_name="streammap",
                    library_version=VERSION,
                    tqdm_class=_bar(self.cancelled),
                ),
                f"{self.repo}: {name}",
            )
        )

    def check_cancelled(self) -> None:
        """Raise if the request was cancelled.

        Raises:
            CheckpointError: it was.
        """
        if self.cancelled.is_set():
            raise CheckpointError(f"{self.repo}: cancelled")

    def check_room(self, nbytes: int) -> None:
        """Check that the disk of the cache has room.

        Raises:
            CheckpointError: it has not; names both sizes.
        """
        folder = cache_folder()
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if nbytes > free:
            raise CheckpointError(
                f"{self.repo}: takes {format_nbytes(nbytes)} of the Hub's cache, "
                f"{format_nbytes(free)} are free in {cache_folder()}",
                hint="use --stream, which needs no disk, or set HF_HUB_CACHE to another disk",
            )

    @contextmanager
    def stream(self, url: str, headers: dict[str, str]) -> Iterator[Any]:
        """An answer whose body is read in pieces.

        Raises:
            TransientError: a retry may succeed.
            CheckpointError: a retry would fail too.
        """
        utils = _utils()
        try:
            with utils.get_session().stream(
                "GET", url, headers=headers, timeout=TIMEOUT_SECONDS, follow_redirects=True
            ) as response:
                utils.hf_raise_for_status(response)
                yield response
        except (CheckpointError, TransientError):
            raise
        except Exception as error:  # the client's and its transport's are many
            raise self.explained(error) from error

    def patiently(
        self, ask: Callable[[], _Result], where: str, *, needs_name: bool = False
    ) -> _Result:
        """The result of `ask`, retried while its errors are transient.

        Args:
            needs_name: Whether to give up at once where the Hub's own name is not known: nothing
                was fetched yet, and a machine without a network gets none by waiting.

        Raises:
            CheckpointError: it failed for good.
        """

        def explained(error: Exception) -> CheckpointError | TransientError:
            found = self.explained(error)
            if needs_name and isinstance(found, TransientError) and _is_unnamed(error):
                return self._error(found.reason, hint="check the network, or the path")
            return found

        return patiently(ask, explained, where=where, cancelled=self.cancelled)

    def explained(self, error: Exception) -> CheckpointError | TransientError:
        """An error of the client as one of ours."""
        from huggingface_hub import errors

        if isinstance(error, errors.OfflineModeIsEnabled):
            return self._error("HF_HUB_OFFLINE is set", hint="unset it to reach the Hub")
        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
            cause = error.__cause__  # not in the cache, and the Hub failed
            return self.explained(cause if isinstance(cause, Exception) else Exception(str(cause)))
        status = _status(error)
        if status in _BUSY:
            return TransientError(f"the Hub answers {status}", seconds=_asked_wait(error))
        if status is None and _is_transport(error):
            reason = str(error) or type(error).__name__
            return TransientError(f"no connection to {endpoint()} ({reason})")
        known: tuple[tuple[type[Exception], Callable[[], CheckpointError]], ...] = (
            (errors.GatedRepoError, self._gated),
            (errors.RevisionNotFoundError, lambda: self._no_revision(error)),
            (errors.RepositoryNotFoundError, lambda: self._no_repo(error)),
            (errors.EntryNotFoundError, lambda: self._no_file(error)),
            (errors.HFValidationError, lambda: self._error(f"no name of a repository: {error}")),
        )
        for kind, explain in known:
            if isinstance(error, kind):
                return explain()
        if status in (401, 403):
            return self._no_repo(error)
        if isinstance(error, OSError) and error.errno:
            return self._error(str(error), hint="free disk space, or set HF_HOME to another disk")
        if isinstance(error, OSError) and status is None:  # a body of another length
            return TransientError(str(error).splitlines()[0])
        if status is None and isinstance(error.__cause__, Exception):
            return self.explained(error.__cause__)
        first = str(error).strip().splitlines() or [type(error).__name__]
        return self._error(f"the Hub's client failed: {first[0]}")

    def _error(self, message: str, *, hint: str | None = None) -> CheckpointError:
        return CheckpointError(f"{self.repo}: {message}", hint=hint)

    def _gated(self) -> CheckpointError:
        return self._error(
            "gated: its owner asks you to accept its terms first",
            hint=f"accept them at {endpoint()}/{self.repo}, and log in: hf auth login"
            + ("" if self.has_token else " (no token is set now)"),
        )

    def _no_revision(self, error: Exception) -> CheckpointError:
        return self._error(
            "no such revision",
            hint=f"{endpoint()}/{self.repo}/tree/main lists them; without @ it is main",
        )

    def _no_file(self, error: Exception) -> CheckpointError:
        return self._error("a file is gone from the commit", hint="open it again")

    def _no_repo(self, error: Exception) -> CheckpointError:
        status = _status(error)
        if status == 401 and self.has_token:
            return self._error(
                "the Hub does not accept the token",
                hint="log in again: hf auth login, or set HF_TOKEN to a token that is valid",
            )
        if status == 403:
            return self._error(
                "the token may not do this",
                hint="use a token with access to it: hf auth login, or set HF_TOKEN",
            )
        if self.has_token:
            return self._error(
                f"not on {endpoint()}, or private and not yours",
                hint="check the name, and who you are: hf auth whoami",
            )
        return self._error(
            f"not on {endpoint()}, or private",
            hint="check the name; if it is private, log in: hf auth login, or set HF_TOKEN",
        )

    @property
    def has_token(self) -> bool:
        """Whether requests carry one."""
        return "authorization" in {name.lower() for name in self.headers}


def _utils() -> Any:
    """huggingface_hub.utils: imported by name, because its annotations are incomplete."""
    return importlib.import_module("huggingface_hub.utils")


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def _asked_wait(error: Exception) -> float:
    """Seconds that the server asks us to wait."""
    response = getattr(error, "response", None)
    value = response.headers.get("Retry-After", "") if response is not None else ""
    return float(value) if value.isdecimal() else 0.0


def _is_transport(error: Exception) -> bool:
    """Whether a connection failed. By class name: the client has changed its transport before."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"TransportError", "ConnectionError", "TimeoutError", "StreamError"})


def _is_unnamed(error: BaseException | None) -> bool:
    """Whether it came of a host name that nobody knows."""
    while error is not None:
        if isinstance(error, socket.gaierror) or "name resolution" in str(error).lower():
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def no_bars() -> Iterator[None]:
    """Hide the client's own progress bars."""
    utils = _utils()
    if utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()


def _bar(cancelled: threading.Event) -> Any:
    """A progress bar that shows nothing, and aborts a cancelled download."""
    base: Any = _utils().tqdm

    class Silent(base):  # type: ignore[misc]
        """Takes part in a download only to be able to abort it."""

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            """Called with each piece that arrived."""
            if cancelled.is_set():
                raise CheckpointError("cancelled")
            return None

    return Silent
