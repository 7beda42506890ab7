"""A branch of a Hub repository as the destination of a result.

Each shard is a commit of its own, sent when it is complete; content that the repository already has
(by its sha256) is not sent again. The last commit brings config.json, the index and the model card.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, final

from streammap.errors import CheckpointError, OutputError
from streammap.io.storage import hub_client

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

MESSAGE = "Upload a checkpoint made by streammap"
_CARD = "README.md"
_HARMLESS = (".gitattributes", _CARD)
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Push:
    """Where and how a result is pushed."""

    repo: str
    branch: str = "main"
    private: bool = True
    """Visibility of a new repository; an existing one keeps its own."""
    message: str = MESSAGE


@final
class HubSink:
    """A branch; it and its repository are created when needed."""

    file = None

    def __init__(self, push: Push, card: Callable[[], str]) -> None:
        """Check the token, and create the repository and the branch.

        Args:
            card: Makes the model card.

        Raises:
            OutputError: no token, no write access, no connection.
        """
        self._push, self._card = push, card
        self.label = f"hf://{push.repo}@{push.branch}"
        self._client = hub_client.Client(push.repo, threading.Event())
        if not self._client.has_token:
            raise OutputError(
                f"{self.label}: pushing needs a token, and none is set",
                hint="log in with one that may write: hf auth login, or set HF_TOKEN",
            )
        self._ask(self._make)

    def names(self) -> Mapping[str, str]:
        """The files of the branch, each with its sha256 or git blob id."""

        def ask() -> Mapping[str, str]:
            info = self._client.api.model_info(
                self._push.repo, revision=self._push.branch, files_metadata=True
            )
            return {
                s.rfilename: (s.lfs.sha256 if s.lfs else s.blob_id) or ""
                for s in info.siblings or ()
            }

        return self._ask(ask)

    def is_harmless(self, name: str) -> bool:
        """Whether it is a file that every new repository has."""
        return name in _HARMLESS

    def put(self, name: str, path: Path) -> str:
        """Commit a shard."""
        from huggingface_hub import CommitOperationAdd

        digest = hashlib.sha256()
        with path.open("rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
        operation = CommitOperationAdd(name, path)
        self._commit([operation], f"{self._push.message} ({name})")
        stored = self.names().get(name, "")
        if len(stored) == 64 and stored != digest.hexdigest():
            raise OutputError(
                f"{self.label}: {name}: sha256 {stored} is there, {digest.hexdigest()} was sent",
                hint="is another program writing to the repository?",
            )
        return stored

    def put_all(self, contents: Mapping[str, bytes]) -> None:
        """Commit small files in one commit."""
        from huggingface_hub import CommitOperationAdd

        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        self._commit(operations, self._push.message)

    def remove(self, names: Sequence[str]) -> None:
        """Remove files in one commit."""
        from huggingface_hub import CommitOperationDelete

        if names:
            operations = [CommitOperationDelete(name) for name in names]
            self._commit(operations, f"{self._push.message} (make room)")

    def extras(self) -> Iterable[tuple[str, bytes]]:
        """The model card."""
        yield _CARD, self._card().encode()

    def _make(self) -> None:
        push, api = self._push, self._client.api
        api.create_repo(push.repo, private=push.private, exist_ok=True)
        if push.branch != "main":
            api.create_branch(push.repo, branch=push.branch, exist_ok=True)

    def _commit(
        self, operations: Iterable["CommitOperationAdd | CommitOperationDelete"], message: str
    ) -> None:
        push = self._push
        self._ask(
            lambda: self._client.api.create_commit(
                push.repo,
                list(operations),
                commit_message=message,
                revision=push.branch,
            )
        )

    def _ask(self, do: Callable[[], _Result]) -> _Result:
        try:
            with hub_client.no_bars():
                return self._client.patiently(do, self.label)
        except CheckpointError as error:
            raise OutputError(error.message, hint=error.hint) from error
