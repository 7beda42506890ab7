"""What is asked of fsspec: a driver for a URL, a listing of files, and its errors as ours.

Drivers are many authors' code, and raise anything. Whatever comes out of one is a CheckpointError
here, with no password and no signature of the URL in its text.
"""

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import unquote

from streammap.errors import CheckpointError, StreammapError, redacted
from streammap.io import filenames, safe_open

_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "http": "fsspec aiohttp",
    "https": "fsspec aiohttp",
}
"""Scheme of a URL -> what to install for it."""
_WEB = ("http://", "https://")
_INDIRECT = frozenset(
    {
        *("asynclocal", "asyncwrapper", "bcache", "blockcache", "cached", "data", "dir"),
        *("filecache", "generic", "jlab", "jupyter", "libarchive", "local", "reference"),
        *("simplecache", "tar", "zip"),
    }
)
"""Protocols that read through another file, or this machine's: no place where files are."""
_FILES = (*filenames.WEIGHTS, ".json", ".toml")
_MAX_DEPTH = 4
_MAX_PAGES = 200
"""Of a web server's listings of folders."""
_MAX_PAGE_NBYTES = 10_000_000
_LASTING = (
    *(FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(AttributeError, LookupError, NotImplementedError, TypeError, ValueError),
)
_BUSY = (408, 425, 429)
_MIN_SECRET = 4
"""Letters: a shorter part of a URL may be part of any word."""
_PARTS = re.compile(r"[^\w.~%+-]+")
_Result = TypeVar("_Result")
Info = Mapping[str, Any]
"""A driver's description of a file: its size, and what tells versions apart."""


def filesystem(url: str) -> tuple[Any, str]:
    """Fsspec's file system of a URL, and the path in it.

    Raises:
        CheckpointError: a kind of URL that is unknown, or no place of files; a driver that is not
            installed, or that refuses.
    """
    check_plain(url)
    try:
        core = importlib.import_module("fsspec.core")
        fs, path = core.url_to_fs(url)
    except ImportError as error:
        raise CheckpointError(f"{url}: {error}", hint=_install(url)) from error
    except ValueError as error:
        raise CheckpointError(f"{url}: {_told(error, url)}", hint="check the URL") from error
    except Exception as error:  # drivers raise all kinds of errors
        raise explained(url, error, url) from error
    return fs, str(path).rstrip("/")


def check_plain(url: str) -> None:
    """Refuse URLs that lead through other files.

    Raises:
        CheckpointError: a chain of URLs, or a protocol that is no place of files.
    """
    if "::" in url.partition("?")[0]:
        raise CheckpointError(
            f"{url}: a chain of URLs, expected a single one",
            hint="unpack or download it first, and name the folder",
        )
    protocol = url.partition("://")[0].lower()
    if protocol in _INDIRECT:
        raise CheckpointError(
            f"{url}: {protocol}:// reads through other files, expected a place where files are: "
            "s3, gs, az, https, sftp ...",
            hint="name the place itself, or a path of this machine",
        )


def asked(do: Callable[[], _Result], where: str, url: str) -> _Result:
    """The result of asking a driver.

    Args:
        where: What is asked about, for messages.
        url: As it was given: what is secret in it stays out of messages.

    Raises:
        CheckpointError: whatever it raised.
    """
    try:
        return do()
    except StreammapError:
        raise
    except Exception as error:  # drivers raise all kinds of errors
        raise explained(where, error, url) from error


def explained(where: str, error: Exception, url: str) -> CheckpointError:
    """An error of a driver as one of ours."""
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{where}: no such folder or file", hint="check the URL")
    told = _told(error, url)
    if isinstance(error, PermissionError) or "redential" in f"{type(error).__name__} {error}":
        return CheckpointError(
            f"{where}: access denied ({told})",
            hint="check the credentials: AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, or "
            "~/.config/fsspec",
        )
    return CheckpointError(f"{where}: {told}", hint="check the URL and the network")


def is_lasting(error: Exception) -> bool:
    """Whether a retry would fail too."""
    if isinstance(error, _LASTING) or "redential" in f"{type(error).__name__} {error}":
        return True
    status = getattr(error, "status", None)  # of a web server's answer
    return isinstance(status, int) and 400 <= status < 500 and status not in _BUSY


def first_line(error: Exception) -> str:
    """The first line of an error's message; its class, if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_file(fs: Any, path: str) -> bool:
    """Whether there is a file, and no folder.

    A web server answers for a folder as it does for a file: with a page.
    """
    if not path.startswith(_WEB):
        return bool(fs.isfile(path))
    if path.partition("?")[0].endswith(_FILES):
        return True
    info = fs.info(path)
    if "html" not in str(info.get("mimetype")):
        return True
    if int(info.get("size") or 0) > _MAX_PAGE_NBYTES:
        raise CheckpointError(
            f"{path}: a page of {info['size']} bytes, at most {_MAX_PAGE_NBYTES} for a list",
            hint="name a file, or download the folder",
        )
    return False


def listed(fs: Any, folder: str) -> dict[str, tuple[str, Info]]:
    """The files in a folder and in those inside: relative name -> the driver's path, and info.

    A name that leads out of the folder is left out: a server may say anything.
    """
    base = len(folder.rstrip("/"))
    is_web = folder.startswith(_WEB)
    found = _linked(fs, folder) if is_web else fs.find(folder, maxdepth=_MAX_DEPTH, detail=True)
    files = {}
    for path, info in found.items():
        name = str(path)[base:].lstrip("/")
        if is_web:
            name = unquote(name)
        if all(map(safe_open.is_plain_name, name.split("/"))) and not (is_web and "?" in str(path)):
            files[name] = (str(path), info)
    return files


def _linked(fs: Any, folder: str) -> dict[str, Info]:
    """The files that a web server's pages list."""
    files: dict[str, Info] = {}
    for n, (above, _, inside) in enumerate(_walk(fs, folder)):
        if n == _MAX_PAGES:
            raise CheckpointError(
                f"{folder}: more than {_MAX_PAGES} folders inside",
                hint="name the folder of one checkpoint",
            )
        files |= {f"{above.rstrip('/')}/{name}": info for name, info in inside.items()}
    return files


def _walk(fs: Any, folder: str) -> Iterator[tuple[str, Any, Mapping[str, Info]]]:
    walk: Iterator[tuple[str, Any, Mapping[str, Info]]] = fs.walk(
        folder, maxdepth=_MAX_DEPTH, detail=True
    )
    return walk


def _told(error: Exception, url: str) -> str:
    """What an error says, without what is secret in a URL, quoted or not."""
    text = redacted(first_line(error))
    secrets = set(_PARTS.split(url)) - set(_PARTS.split(redacted(url)))
    for secret in sorted(secrets, key=len, reverse=True):
        for form in (secret, unquote(secret)):
            if len(form) >= _MIN_SECRET:
                text = text.replace(form, "***")
    return text


def _install(url: str) -> str:
    return f"pip install {_PACKAGES.get(url.partition('://')[0], 'fsspec')}"
