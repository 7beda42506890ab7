"""Schemes: which heads and layers of the large model one of the small model stands for.

    {"width_scheme": [[0, 6], [1, 7], ...], "depth_scheme": [[0, 6], [1, 7], ...]}

Entry i lists the heads (layers) of the large model that head (layer) i of the small one stands for.
One scheme serves both directions. `reserved_heads` and `reserved_layers` are accepted and
ignored. The form is that of the original map tools; see schemes/README.md.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streammap.architectures import schema
from streammap.common import strict_json
from streammap.common.kinds import Real, Whole
from streammap.errors import PlanError, SchemeError
from streammap.io.storage import resolve
from streammap.planning import requests
from streammap.planning.copies import shares
from streammap.planning.requests import AxisRequest, Groups

_MAX_NBYTES = 100_000_000
UNUSED = ("reserved_heads", "reserved_layers")
SPACES = ("width", *schema.SPACES, "layers")
"""Entries with a request each, see requests.py; `axes` holds further ones by the axis' own name."""
COPIES = ("noise", "seed", "split")
"""Entries that say what tells copies apart, for growing alone."""
_KEYS = ("width_scheme", "depth_scheme", *SPACES, "axes", *COPIES, *UNUSED)
NOISE = Real(-20.0, 120.0, hint="10 is usual: --noise 10")
"""Signal to noise, in dB."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """Groups of heads, of layers, or of both."""

    width: Groups | None = None
    depth: Groups | None = None
    unused: tuple[str, ...] = ()
    """Entries that were given and are ignored."""
    spaces: Mapping[str, AxisRequest] = field(default_factory=dict)
    """Space ("hidden", "kv_heads", "width" ...) -> its request."""
    axes: Mapping[str, AxisRequest] = field(default_factory=dict)
    """Axis of the architecture spec -> its request."""
    copies: Mapping[str, Any] = field(default_factory=dict)
    """noise: a float, seed: an int, split: a Split; those that are given."""

    def as_json(self) -> dict[str, object]:
        """The scheme in the file's form."""
        entries = {"width_scheme": self.width, "depth_scheme": self.depth}
        return {
            name: [list(group) for group in groups]
            for name, groups in entries.items()
            if groups is not None
        }

    def as_text(self) -> str:
        """The file itself, one group a line."""
        parts = []
        for name, groups in self.as_json().items():
            assert isinstance(groups, list)
            lines = ",\n".join(f"        {json.dumps(group)}" for group in groups)
            parts.append(f'    "{name}": [\n{lines}\n    ]')
        return "{\n" + ",\n".join(parts) + "\n}"


def load_scheme(source: str | Path | Mapping[str, object] | Scheme) -> Scheme:
    """Load a scheme from a file, or from a dict of the same form.

    Raises:
        SchemeError: not JSON, an unknown key, an empty group, a repeated member, a bad index.
    """
    if isinstance(source, Scheme):
        return source
    if isinstance(source, Mapping):
        return _parse(source, "scheme")
    path = Path(source)
    try:
        resolve.check_name(str(source))
        with path.open("rb") as file:  # a pipe is fine: the user has named it
            text = file.read(_MAX_NBYTES + 1)
        if len(text) > _MAX_NBYTES:
            raise SchemeError(f"{path}: more than {_MAX_NBYTES} bytes", hint="is this a scheme?")
        content = strict_json.loads(text)
    except OSError as error:
        raise SchemeError(f"{path}: {error.strerror}", hint="check the path") from error
    except ValueError as error:
        raise SchemeError(f"{path}: not JSON: {error}", hint="see schemes/README.md") from error
    if not isinstance(content, dict):
        raise SchemeError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return _parse(content, path.name)


def template(n_large: int, n_small: int) -> Groups:
    """The original's width map without a scheme: i with n_small + i, where that exists."""
    return tuple(
        (i, n_small + i) if n_small + i < n_large else (i,) for i in range(min(n_small, n_large))
    )


def _parse(content: Mapping[str, object], where: str) -> Scheme:
    unknown = [key for key in content if key not in _KEYS]
    if unknown:
        raise SchemeError(
            f"{where}: unknown key {unknown[0]!r}", hint=f"known are {', '.join(_KEYS)}"
        )
    width = _groups(content.get("width_scheme"), f"{where}: width_scheme")
    depth = _groups(content.get("depth_scheme"), f"{where}: depth_scheme")
    axes = content.get("axes", {})
    if not isinstance(axes, Mapping):
        raise SchemeError(f"{where}: axes is {axes!r}, expected a table of axes")
    return Scheme(
        width,
        depth,
        tuple(key for key in UNUSED if key in content),
        {
            space: requests.parse_request(content[space], f"{where}: {space}")
            for space in SPACES
            if space in content
        },
        {str(k): requests.parse_request(v, f"{where}: axes: {k}") for k, v in axes.items()},
        {name: _of_copies(name, content[name], where) for name in COPIES if name in content},
    )


def _of_copies(name: str, value: object, where: str) -> object:
    """What tells copies apart, read as the option of the same name is."""
    try:
        if name == "split":
            return shares.parse(value, name)
        return (NOISE if name == "noise" else Whole()).parse(value, name)
    except PlanError as error:
        raise SchemeError(f"{where}: {error.message}", hint=error.hint) from error


def _groups(value: object, where: str) -> Groups | None:
    if value is None:
        return None
    groups, weights = requests.parse_groups(value, where)
    if weights is not None:
        raise SchemeError(
            f"{where}: weighted members", hint='give them as {"heads": {"groups": [...]}}'
        )
    return groups
