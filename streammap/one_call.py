"""Operators as one call each: open, plan and save.

    streammap.coalesce("bert-base", "bert-small", width=2, depth=2)

Those of any number of sources are planned, and saved where an output is named.
"""

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, overload

from streammap.api import LazyCheckpoint, card, open
from streammap.common import declare
from streammap.common.declare import declared, option, takes
from streammap.errors import PlanError
from streammap.io.storage.resolve import PathLike
from streammap.operators import calls, registry
from streammap.operators.declare import Operator, PlanLike, inputs_of
from streammap.operators.finish import Finish, following
from streammap.output import destination
from streammap.output.run import Report
from streammap.output.save_options import SaveOptions

if TYPE_CHECKING:
    from streammap.operators.convert import Convert
    from streammap.operators.depth.restack import Restack
    from streammap.operators.interpolate import Interpolate
    from streammap.operators.ordering.align import Align
    from streammap.operators.ordering.permute import Permute
    from streammap.operators.resize import Coalesce, Decoalesce

P = ParamSpec("P")


@declared
class _CallOptions(Finish, SaveOptions):
    """What a one-call function takes beside its operator's options."""

    stream: bool = option(
        default=False, help="Read models of the Hub as needed, not through the Hub's cache."
    )


def _one_call(
    operator: type[Operator], all_options: Callable[P, _CallOptions]
) -> Callable[Concatenate[PathLike, PathLike, P], Report]:
    """An operator as one call: open the source, plan, save."""

    def call(source: PathLike, output: PathLike, options: _CallOptions) -> Report:
        made, how = declare.part(operator, options), declare.part(SaveOptions, options)
        with open(source, stream=options.stream).apply(made, stream=options.stream) as planned:
            done = functools.reduce(
                LazyCheckpoint.apply, following(operator, vars(options)), planned
            )
            return destination.save(done.plan, output, how, card=card)

    call.__name__ = call.__qualname__ = operator.name.replace("-", "_")
    call.__doc__ = f"{inspect.cleandoc(operator.__doc__ or '')}\n\nSaved to `output`, in one call."
    return takes(all_options, leads=operator)(call)


def _call_of_many(
    operator: type[Operator], all_options: Callable[..., _CallOptions]
) -> Callable[..., "LazyCheckpoint | Report"]:
    """An operator with any number of sources as one call; the output has to be named."""

    def call(
        source: PlanLike, output: PathLike | None = None, given: Any = None
    ) -> "LazyCheckpoint | Report":
        made, how = declare.part(operator, given), declare.part(SaveOptions, given)
        opened = LazyCheckpoint(calls.plan_of(source, stream=given.stream))
        planned = opened.apply(made, stream=given.stream)
        planned = functools.reduce(LazyCheckpoint.apply, following(operator, vars(given)), planned)
        if output is not None:
            with planned:
                return destination.save(planned.plan, output, how, card=card)
        if how != SaveOptions():
            raise PlanError(
                f"{operator.name}: options of a result, and no output",
                hint='give output="out", or give them to `save`',
            )
        return planned

    call.__name__ = call.__qualname__ = operator.name.replace("-", "_")
    told = "Planned; saved to `output` in one call where one is given."
    call.__doc__ = f"{inspect.cleandoc(operator.__doc__ or '')}\n\n{told}"
    return takes(all_options, leads=operator)(call)


if TYPE_CHECKING:

    @declared
    class _Coalesce(Coalesce, _CallOptions):
        pass

    @declared
    class _Decoalesce(Decoalesce, _CallOptions):
        pass

    @declared
    class _Interpolate(Interpolate, _CallOptions):
        pass

    @declared
    class _Convert(Convert, _CallOptions):
        pass

    @declared
    class _Permute(Permute, _CallOptions):
        pass

    @declared
    class _Restack(Restack, _CallOptions):
        pass

    @declared
    class _Align(Align, _CallOptions):
        pass

    coalesce = _one_call(Coalesce, _Coalesce)
    decoalesce = _one_call(Decoalesce, _Decoalesce)
    interpolate = _one_call(Interpolate, _Interpolate)
    convert = _one_call(Convert, _Convert)
    permute = _one_call(Permute, _Permute)
    restack = _one_call(Restack, _Restack)
    align = _one_call(Align, _Align)

    @overload
    def blend(source: PlanLike, *others: PlanLike, output: PathLike, **options: Any) -> Report: ...
    @overload
    def blend(source: PlanLike, *others: PlanLike, **options: Any) -> LazyCheckpoint: ...
    def blend(source: PlanLike, *others: PlanLike, **options: Any) -> LazyCheckpoint | Report:
        """See operators/blend.py."""

    @overload
    def merge_lora(
        source: PlanLike, *adapters: PlanLike, output: PathLike, **options: Any
    ) -> Report: ...
    @overload
    def merge_lora(source: PlanLike, *adapters: PlanLike, **options: Any) -> LazyCheckpoint: ...
    def merge_lora(
        source: PlanLike, *adapters: PlanLike, **options: Any
    ) -> LazyCheckpoint | Report:
        """See operators/merge_lora.py."""

else:

    def __getattr__(name: str) -> Callable[..., "LazyCheckpoint | Report"]:
        """Any operator as one call, made when it is first used."""
        known = name.replace("_", "-")
        if name.startswith("_") or known not in registry.names():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return _made(registry.load(known))


@functools.cache
def _made(operator: type[Operator]) -> Callable[..., "LazyCheckpoint | Report"]:
    options: Any = declared(type(operator.__name__, (operator, _CallOptions), {}))
    takes_many = any(
        one.about.positional and one.kind.form == "many" for one in inputs_of(operator)
    )
    return (_call_of_many if takes_many else _one_call)(operator, options)
