"""What a HubServer serves, how it fails on purpose, and what it did."""

import threading
from dataclasses import dataclass, field

from streammap.testing.hubrepos import Repo


@dataclass(slots=True)
class Faults:
    """How the server fails on purpose; each may be changed while it runs."""

    drop_every: int = 0
    """Every n-th answer with a file's bytes breaks off in the middle."""
    unavailable: int = 0
    """The first n requests for each file's bytes get 503."""
    seconds: float = 0.0
    """What each answer waits before it begins."""
    nbytes_per_second: float = 0.0
    """Speed of a file's bytes; 0: as fast as can be."""
    ignore_ranges: bool = False
    """Whether ranges are answered with the whole file."""
    short_by: int = 0
    """Bytes that each answer to a range lacks at its end, though all else says they come; at most
    half of them."""
    refuse_uploads_after: int | None = None
    """Uploads of weights that go well, before all others are refused."""
    etag: str | None = None
    """What all files are called instead of their own names."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A request that was answered."""

    method: str
    path: str
    span: str
    """The Range header; "" where there was none."""
    status: int
    nbytes: int
    """Bytes of the body that were sent."""
    agent: str
    """The User-Agent header."""


@dataclass(slots=True)
class Ledger:
    """What the server did so far."""

    seen: list[Seen] = field(default_factory=list)
    n_bodies: int = 0
    n_uploads: int = 0
    tried: dict[str, int] = field(default_factory=dict)
    """Path -> how often its bytes were asked for."""
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(slots=True)
class HubState:
    """What the threads of a server share."""

    tokens: dict[str, str]
    """Token -> user."""
    redirects: bool
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    faults: Faults = field(default_factory=Faults)
    ledger: Ledger = field(default_factory=Ledger)
    lets_in: set[tuple[str, str]] = field(default_factory=set)
    """(user, gated repository) that may read it."""
