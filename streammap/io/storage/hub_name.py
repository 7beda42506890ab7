"""Names of models of the Hub, as users write them.

org/name, org/name@revision, hf://org/name@revision/folder/or/file
"""

import re
from dataclasses import dataclass
from urllib.parse import unquote

from streammap.errors import CheckpointError
from streammap.io import filenames

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*(@.+)?", re.ASCII)
_FILES = (*filenames.WEIGHTS, ".json", ".toml")
_URI = re.compile(
    r"(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(/(?P<path>.*))?"
)


@dataclass(frozen=True, slots=True)
class HubName:
    """A repository, a revision, and maybe a folder or file inside."""

    repo: str
    revision: str
    path: str
    """Folder or file inside; "" for all."""
    given: str


def is_one(text: str) -> bool:
    """Whether a name looks like a repository: org/name, and not like a file."""
    return _ID.fullmatch(text) is not None and not text.endswith(_FILES)


def parse(text: str) -> HubName:
    """Split a name into its parts.

    Raises:
        CheckpointError: not a name of a model.
    """
    if not text.startswith("hf://"):
        repo, _, revision = text.partition("@")
        return HubName(repo, revision or "main", "", text)
    rest = text.removeprefix("hf://").removeprefix("models/")
    parts = _URI.fullmatch(rest)
    if parts is None or rest.startswith(("datasets/", "spaces/", "buckets/")):
        raise CheckpointError(
            f"{text}: not a model of the Hub",
            hint="expected hf://org/name or hf://org/name@revision",
        )
    revision = unquote(parts["revision"] or "main")
    return HubName(parts["repo"], revision, (parts["path"] or "").strip("/"), text)
