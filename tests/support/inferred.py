"""What spec infer finds of the default configurations of model types."""

from functools import cache

from streammap.tools.spec_infer.infer import named
from streammap.tools.spec_infer.naming import AxisNaming


@cache
def named_type(model_type: str) -> AxisNaming:
    """The axes of the default configuration of a class."""
    return named({"model_type": model_type}, name=model_type)
