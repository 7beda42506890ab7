"""The state of a HubServer: repositories, faults, and a record of its answers."""

import threading
from dataclasses import dataclass, field

from streammap.testing.hubrepos import Repo


@dataclass(slots=True)
class Faults:
    """How the server fails on purpose; each may be changed while it runs."""

    drop_every: int = 0
    """Every n-th answer with a file's bytes breaks off in the middle; 0: none does."""
    unavailable: int = 0
    """The first n requests for each file's bytes get 503."""
    seconds: float = 0.0
    """How long each answer is delayed."""
    nbytes_per_second: float = 0.0
    """Speed of a file's bytes; 0: unlimited."""
    ignore_ranges: bool = False
    """Whether ranges are answered with the whole file."""
    short_by: int = 0
    """How many bytes each answer to a range lacks at its end, contrary to its headers; at most half
    of them."""
    refuse_uploads_after: int | None = None
    """How many uploads of weights succeed before all others are refused."""
    etag: str | None = None
    """The etag of all files, instead of their own."""


@dataclass(frozen=True, slots=True)
class Seen:
    """An answered request."""

    method: str
    path: str
    span: str
    """The Range header; "" if there was none."""
    status: int
    nbytes: int
    """Bytes of the body that were sent."""
    agent: str
    """The User-Agent header."""


@dataclass(slots=True)
class Ledger:
    """Everything the server has answered so far."""

    seen: list[Seen] = field(default_factory=list)
    n_bodies: int = 0
    n_uploads: int = 0
    tried: dict[str, int] = field(default_factory=dict)
    """Path -> how often its bytes were requested."""
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(slots=True)
class HubState:
    """The state that the threads of a server share."""

    tokens: dict[str, str]
    """Token -> user."""
    redirects: bool
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    ledger: Ledger = field(default_factory=Ledger)
    lets_in: set[tuple[str, str]] = field(default_factory=set)
    """Pairs of a user and a gated repository that the user may read."""
