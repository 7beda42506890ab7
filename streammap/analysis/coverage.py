"""Which of transformers' model types are served, by what their models do, and why others aren't.

The types are those of the installed transformers: its auto classes name a model class for each.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import resources

from streammap.architectures import registry
from streammap.common import optional, table
from streammap.common.table import Column

TASKS: Mapping[str, str] = {
    "causal LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "masked LM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "seq2seq LM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "CTC": "MODEL_FOR_CTC_MAPPING_NAMES",
    "image classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}
"""What models are for -> transformers' mapping of model types to classes."""
NO_SPEC = "no spec yet: `streammap spec infer` drafts one"
_TASK_COLUMNS = (
    Column("task"),
    Column("served", "right"),
    Column("of", "right"),
    Column("share", "right"),
)
_TYPE_COLUMNS = (Column("model type"), Column("task", wraps=True), Column("why not", wraps=True))


@dataclass(frozen=True, slots=True)
class TaskCoverage:
    """The model types of one task."""

    task: str
    served: tuple[str, ...]
    unserved: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unserved:
    """A model type that no spec serves."""

    model_type: str
    tasks: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """What `streammap architectures --coverage` prints."""

    transformers: str
    """Its version."""
    tasks: tuple[TaskCoverage, ...]
    unserved: tuple[Unserved, ...]

    def as_json(self) -> dict[str, object]:
        """All of it."""
        return asdict(self)

    def __str__(self) -> str:
        counts = [_counted(task) for task in self.tasks]
        others = [(one.model_type, ", ".join(one.tasks), one.why) for one in self.unserved]
        return "\n".join(
            [
                f"model types of transformers {self.transformers}",
                "",
                *table.table(_TASK_COLUMNS, counts),
                "",
                *table.table(_TYPE_COLUMNS, others),
            ]
        )


def coverage() -> Coverage:
    """Count the model types that the installed transformers has, and those that specs serve.

    Raises:
        PlanError: transformers is not installed, or too old.
        ArchitectureError: a spec that is wrong.
    """
    auto = optional.library("transformers.models.auto.modeling_auto")
    version: str = optional.library("transformers").__version__
    known = registry.model_types()
    tasks = tuple(_split(task, getattr(auto, name, {}), known) for task, name in TASKS.items())
    others = sorted({model_type for task in tasks for model_type in task.unserved})
    why = reasons()
    return Coverage(
        version,
        tasks,
        tuple(
            Unserved(
                model_type,
                tuple(task.task for task in tasks if model_type in task.unserved),
                why.get(model_type, NO_SPEC),
            )
            for model_type in others
        ),
    )


def reasons() -> dict[str, str]:
    """Model type -> why no spec serves it."""
    text = (resources.files("streammap") / "architectures" / "unserved.toml").read_text()
    return {name: str(why) for name, why in tomllib.loads(text).items()}


def _split(task: str, mapped: Iterable[str], known: Mapping[str, str]) -> TaskCoverage:
    types = sorted(mapped)
    return TaskCoverage(
        task,
        tuple(one for one in types if one in known),
        tuple(one for one in types if one not in known),
    )


def _counted(task: TaskCoverage) -> tuple[str, str, str, str]:
    n_served = len(task.served)
    n_all = n_served + len(task.unserved)
    return task.task, str(n_served), str(n_all), f"{n_served / max(n_all, 1):.0%}"
