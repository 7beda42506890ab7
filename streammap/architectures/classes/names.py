"""Names of tensors in files -> their names in a model of transformers, which may be others."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol, final

from streammap.common import optional

if TYPE_CHECKING:
    import torch


class Pretrained(Protocol):
    """A model of transformers: the part of its interface that is used here."""

    base_model_prefix: str
    all_tied_weights_keys: Mapping[str, str]
    config: object
    _keys_to_ignore_on_load_missing: Iterable[str] | None
    _keys_to_ignore_on_load_unexpected: Iterable[str] | None
    _weight_conversions: list[object]

    def named_buffers(self) -> "Iterable[tuple[str, torch.Tensor]]":
        """Buffers by name."""
        ...

    def initialize_weights(self) -> None:
        """Initialise all tensors but those marked with _is_hf_initialized."""
        ...

    def _get_dtype_plan(self, dtype: "torch.dtype") -> "Mapping[str, torch.dtype]": ...


class Transform(Protocol):
    """A renaming or conversion of transformers."""

    source_patterns: list[str]

    def add_tensor(
        self, target_key: str, source_key: str, source_pattern: str, future: object
    ) -> None:
        """Give it one of its sources."""
        ...

    def convert(self, layer_name: str, *, model: object, config: object) -> Mapping[str, object]:
        """What it makes of its sources, by name."""
        ...

    def was_used(self) -> bool:
        """Whether a name had its pattern."""
        ...


@final
class ClassNames:
    """Names in files -> names in a model, as transformers renames them."""

    def __init__(self, model: Pretrained, expected: Mapping[str, object]) -> None:
        """Nothing is renamed yet.

        Args:
            expected: Name in the model -> anything.
        """
        loading = optional.library("transformers.core_model_loading")
        mapping = optional.library("transformers.conversion_mapping")
        self.order: Callable[[str], list[tuple[object, ...]]] = loading.dot_natural_key
        self.transforms: list[Transform] = mapping.get_model_conversion_mapping(model)
        self._prefix, self._expected = model.base_model_prefix, expected
        self._rename: Callable[..., tuple[str, str | None]] = loading.rename_source_key
        self._renamings = [t for t in self.transforms if isinstance(t, loading.WeightRenaming)]
        self._converters = [t for t in self.transforms if isinstance(t, loading.WeightConverter)]
        self._known = {p: t for t in self._converters for p in t.source_patterns}

    def renamed(self, key: str) -> tuple[str, str, Transform | None]:
        """Name in the model, and the pattern and conversion that apply."""
        where = (self._prefix, self._expected)
        name, pattern = self._rename(key, self._renamings, self._converters, *where)
        if name not in self._expected and key in self._expected:
            name, pattern = self._rename(key, [], [], *where)
        return name, pattern or "", None if pattern is None else self._known[pattern]
