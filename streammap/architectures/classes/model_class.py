"""Which class of transformers a config.json is of."""

import importlib
from collections.abc import Mapping

_SEQ2SEQ = "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"
_IMAGE_TEXT = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"
_AUTO = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    _SEQ2SEQ,
    "MODEL_FOR_MASKED_LM_MAPPING",
    _IMAGE_TEXT,
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_MAPPING",
)


def find(config: Mapping[str, object], finished: object) -> type | None:
    """The class that config.json names, or the first that transformers has for its model type.

    Args:
        config: The config.json.
        finished: transformers' own object of it.

    Returns:
        None where it has none.

    Raises:
        ImportError: transformers is not installed, or too old.
    """
    library = importlib.import_module("transformers")
    named = config.get("architectures")
    for name in named if isinstance(named, list) else ():
        found = getattr(library, str(name), None)
        if isinstance(found, type) and hasattr(found, "base_model_prefix"):
            return found
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    first = _first_asked(finished)
    for mapping in sorted(_AUTO, key=first.__ne__):
        options = getattr(auto, mapping, {})
        if type(finished) in options:
            chosen: type | tuple[type, ...] = options[type(finished)]
            return chosen[0] if isinstance(chosen, list | tuple) else chosen
    return None


def _first_asked(finished: object) -> str:
    """The mapping that has the whole of a model in parts; others have its decoder alone."""
    if getattr(finished, "is_encoder_decoder", False):
        return _SEQ2SEQ
    return _IMAGE_TEXT if hasattr(finished, "text_config") else _AUTO[0]
