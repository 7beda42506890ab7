"""Writes parts of a pickle (protocol 2) without the classes that it names.

Importing torch.distributed.checkpoint to pickle its metadata would take more memory than a whole
run.
"""

import struct
from collections.abc import Iterable

STOP = b"."
BEGIN = b"\x80\x02"
FALSE = b"\x89"
TRUE = b"\x88"
NONE = b"N"


def named(module: str, name: str) -> bytes:
    """A class or function."""
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    """A string."""
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def number(value: int) -> bytes:
    """A non-negative integer."""
    if value < 256:
        return b"K" + bytes((value,))
    if value < 2**31:
        return b"J" + value.to_bytes(4, "little")
    encoded = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes((len(encoded),)) + encoded


def tuple_(*items: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(items) + b"t"


def list_(*items: bytes) -> bytes:
    """A list."""
    return b"](" + b"".join(items) + b"e"


def dict_(items: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A dict."""
    return b"}(" + b"".join(key + value for key, value in items) + b"u"


def call(function: bytes, *arguments: bytes) -> bytes:
    """The result of a call."""
    return function + tuple_(*arguments) + b"R"


def made(kind: bytes, state: bytes) -> bytes:
    """An object of a class, with its state."""
    return kind + b")\x81" + state + b"b"


def referred(pid: bytes) -> bytes:
    """A reference to something outside of the pickle."""
    return pid + b"Q"


def value(content: object) -> bytes:
    """A plain value: None, a truth value, a number, text, or a list or tuple of these."""
    match content:
        case None:
            return NONE
        case bool():
            return TRUE if content else FALSE
        case int() if content >= 0:
            return number(content)
        case int():
            encoded = content.to_bytes(content.bit_length() // 8 + 1, "little", signed=True)
            return b"\x8a" + bytes((len(encoded),)) + encoded
        case float():
            return b"G" + struct.pack(">d", content)
        case str():
            return text(content)
        case tuple():
            return tuple_(*map(value, content))
        case list():
            return list_(*map(value, content))
        case _:
            raise TypeError(f"a {type(content).__name__} is no plain value")
