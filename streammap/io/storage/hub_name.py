"""What a user calls a model of the Hub.

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
    """What a user calls a repository."""

    repo: str
    revision: str
    path: str
    """Folder or file inside; "" for all."""
    given: str


def is_one(text: str) -> bool:
    """Whether a name can be a repository's: org/name, and not that of a file."""
    return _ID.fullmatch(text) is not None and not text.endswith(_FILES)


def parse(text: str) -> HubName:
    """Take a name apart.

    Raises:
        CheckpointError: it is none.
    """
    if not text.startswith("hf://"):
        repo, _, revision = text.partition("@")
        return HubName(repo, revision or "main", "", text)
    rest = text.removeprefix("hf://").removeprefix("models/")
    found = _URI.fullmatch(rest)
    if found is None or rest.startswith(("datasets/", "spaces/", "buckets/")):
        raise CheckpointError(
            f"{text}: no model of the Hub", hint="expected hf://org/name or hf://org/name@revision"
        )
    revision = unquote(found["revision"] or "main")
    return HubName(found["repo"], revision, (found["path"] or "").strip("/"), text)
