"""Every error raised on purpose.

StreammapError
├── CheckpointError     a file is not what it says: header, index, pickle, config.json
├── ArchitectureError   no spec fits a checkpoint, or a spec file is wrong
├── SchemeError         a scheme or a saved map is wrong
├── PlanError           a request that makes no sense for this checkpoint
└── OutputError         the result can't be written there
"""

import re
from collections.abc import Sequence

_MOST_LETTERS = 2_000
"""Of a message: a hostile file may hold a key or a value of any length."""


class StreammapError(Exception):
    """Base of all: says what is, what was expected, and one thing to do."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        """Keep `message` (where: what is, what was expected) and `hint` (a thing to do)."""
        self.message = _shown(message)
        self.hint = None if hint is None else _shown(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"


class CheckpointError(StreammapError):
    """A checkpoint's file is broken, lies about itself, or is missing."""


class TruncatedError(CheckpointError):
    """A file was cut short while it was read; what was read before is right."""


class ArchitectureError(StreammapError):
    """No architecture spec fits a checkpoint, or a spec file is wrong."""


class SchemeError(StreammapError):
    """A scheme or a saved map is wrong in itself."""


class PlanError(StreammapError):
    """A request that makes no sense for this checkpoint."""


class OutputError(StreammapError):
    """The result can't be written where it was asked for."""


def printable(text: str) -> str:
    """`text` with each character that a terminal would obey, or not show, written as an escape.

    Keys and file names are others' text: an escape sequence in one could clear the screen or forge
    a line of output.
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def printable_lines(text: str) -> str:
    """`text` of several lines, each as `printable` has it."""
    return "\n".join(map(printable, text.split("\n")))


_PASSWORDS = re.compile(
    # user:password@, where the password may hold any letter, but a port is none; and what stands
    # alone before the @ of a web address, which is a token. abfs://container@account is a name.
    r"(?<=://)(?:[^\s/:@]*:(?!\d{1,5}(?:[/?#]|$))[^\s@'\"]*@(?:[^\s/@'\"]*@)*)"
    r"|(?<=http://)[^\s/@]*@|(?<=https://)[^\s/@]*@"
)
_QUERIES = re.compile(r"(?<=://)([^\s'\"<>?]*)\?[^\s'\"<>]*?(?=[:,;.)\]}]*(?:[\s'\"<>]|$))")
_NAMED = re.compile(
    r"(?i)(?<![\w-])((?:x-(?:amz|goog|ms)-[\w-]+|awsaccesskeyid|(?:secret_?)?access_?key(?:_id)?|"
    r"(?:(?:access|auth|api|hub|session|security)[_-]?)?token|signature|sig|credentials?|"
    r"(?:client_?)?secret|account_?key|api_?key|sas(?:_token)?|password|passwd|pwd)"
    r"(?:=|['\"]\s*[:=]\s*['\"]))[^\s&;,'\"<>)}]+"
)
_TOKENS = re.compile(r"\bhf_(?=[A-Za-z]*[0-9A-Z])[A-Za-z0-9]{8,}|(?<=Bearer )\S+|(?<=Basic )\S{8,}")


def redacted(text: str) -> str:
    """A location, or a text with locations in it, without what must not be passed on.

    Left out are the password (and user) of a URL and all of its query, which is where presigned
    URLs have their signature; elsewhere in a text the values of parameters that are secret by their
    name, and tokens of the Hub. A location stays one: `https://me:pw@host/a?sig=x` becomes
    `https://host/a`.
    """
    if "://" in text:
        text = _QUERIES.sub(r"\1", _PASSWORDS.sub("", text))
    if "=" in text or "'" in text or '"' in text:
        text = _NAMED.sub(r"\1***", text)
    return _TOKENS.sub("***", text)


def _shown(text: str) -> str:
    return _shortened(printable(redacted(text)))


def _shortened(text: str) -> str:
    if len(text) <= _MOST_LETTERS:
        return text
    kept = _MOST_LETTERS // 2
    return f"{text[:kept]} ... ({len(text) - 2 * kept} more letters) ... {text[-kept:]}"


def some(items: Sequence[object], *, limit: int = 3) -> str:
    """The first `limit` of `items` and how many more there are."""
    shown = ", ".join(str(item) for item in items[:limit])
    rest = len(items) - limit
    return shown if rest <= 0 else f"{shown} and {rest} more"
