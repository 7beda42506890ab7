"""Which token has which number: what the tokenizer's files beside a checkpoint say."""

from collections.abc import Iterable, Mapping
from typing import Any

from streammap.errors import CheckpointError
from streammap.io import json_files
from streammap.io.storage.base import Storage

_FAST, _TABLE, _ADDED = "tokenizer.json", "vocab.json", "added_tokens.json"
_OTHERS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
Vocabulary = Mapping[str, int] | bytes
"""Token -> its number; or a file that is compared byte for byte."""


def read(storage: Storage) -> Vocabulary | None:
    """The vocabulary of the tokenizer in a folder; None where there is no tokenizer.

    Raises:
        CheckpointError: a file that can't be read, or has no vocabulary.
    """
    if storage.has(_FAST):
        return _of_fast(json_files.read_stored(storage, _FAST)[0], storage.where(_FAST))
    if storage.has(_TABLE):
        tables = filter(storage.has, (_TABLE, _ADDED))
        return _joined((json_files.read_stored(storage, x)[0], storage.where(x)) for x in tables)
    for name in _OTHERS:
        if storage.has(name):
            return storage.read(name, limit=json_files.MAX_JSON_NBYTES)
    return None


def _of_fast(content: Mapping[str, Any], where: str) -> Mapping[str, int]:
    """Of tokenizer.json: a table, or a list of tokens with their scores; and what was added."""
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, list):
        pairs = [one[0] if isinstance(one, list) and one else None for one in vocabulary]
        vocabulary = {token: i for i, token in enumerate(pairs)}
    added = content.get("added_tokens") or []
    try:
        more = {one["content"]: one["id"] for one in added}
    except (TypeError, KeyError) as error:
        raise _broken(where) from error
    return _joined([(vocabulary, where), (more, where)])


def _joined(tables: Iterable[tuple[object, str]]) -> Mapping[str, int]:
    """Tables in one; each with its file's name, for messages."""
    made: dict[str, int] = {}
    for table, where in tables:
        if not isinstance(table, Mapping) or not all(
            isinstance(token, str) and isinstance(i, int) for token, i in table.items()
        ):
            raise _broken(where)
        made |= table
    return made


def _broken(where: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: no vocabulary: a number for each token is expected",
        hint="save the tokenizer again with save_pretrained",
    )
