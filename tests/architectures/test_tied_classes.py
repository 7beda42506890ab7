"""The head of a spec is that of all classes whose head is the embedding."""

import pytest
import transformers
from transformers.models.auto import modeling_auto

from streammap.analysis.coverage import TASKS
from streammap.architectures import registry


@pytest.mark.slow
def test_each_class_that_ties_its_head_has_one_in_its_spec() -> None:
    types, n_tied = registry.model_types(), 0
    for mapping in TASKS.values():
        for model_type, named in getattr(modeling_auto, mapping).items():
            for name in (named,) if isinstance(named, str) else named:
                if model_type not in types or not hasattr(transformers, name):
                    continue
                known = getattr(transformers, name)
                if not getattr(known, "_tied_weights_keys", None):
                    continue
                # A class of the text part alone is saved with the config of that part.
                if known.config_class.model_type != model_type:
                    continue
                spec = registry.load(types[model_type], {"model_type": model_type})
                assert any(head.is_in([name]) for head in spec.heads), name
                n_tied += 1
    assert n_tied > 150
