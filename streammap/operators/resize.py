"""Coalesce and decoalesce: merge units of any axis, and the way back. resize_plan.py plans them.

Source: Zou, Zhang, Deng, ICLR 2024, arXiv:2404.07999.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from streammap.common.kinds import Choice, Whole
from streammap.errors import PlanError
from streammap.operators.declare import Input, PlanLike, declared, option
from streammap.operators.kinds import SplitLike, SplitOf
from streammap.operators.numbers import Alpha, SettingLike
from streammap.operators.resize_options import HOW, Resize
from streammap.planning.scheme import NOISE

if TYPE_CHECKING:  # help texts need the declarations alone
    from streammap.operators.resize_parts import Copies
    from streammap.planning.plan import Plan

Direction = Literal["coalesce", "decoalesce"]
BLEND = "Blend"
LEARN = "Copies that learn"


@declared
class Coalesce(Resize):
    """Shrink (merge or prune): heads, neurons and layers of a group become their mean.

    What is in no group is pruned.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "coalesce bert-base-uncased/ small/ --width 2 --depth 2",
        "coalesce llama/ small/ --kv-heads to:1 --kv-merge first",
        "coalesce gpt2/ small/ --layers '[[0, 1], [2, 3], [11]]'",
    )

    def plan(self, source: "Plan") -> "Plan":
        """The smaller model.

        Raises:
            SchemeError: groups that do not fit the model.
            PlanError: nothing to do, or a request that makes no sense.
        """
        from streammap.operators import resize_plan

        return resize_plan.plan(self, source, self.target_sizes, grows=False)


@declared
class Decoalesce(Resize):
    """Grow (expand, widen, deepen): units are copied; widening is function-preserving.

    Without sizes or groups, the map saved when SRC was made is used: beside SRC, in the folder
    above, or in the folder that config.json says the model was loaded from.
    """

    examples: ClassVar[tuple[str, ...]] = (
        "decoalesce small/ grown/ --blend-with bert-base-uncased/ --alpha 0.5",
        "decoalesce llama/ wide/ --hidden to:5120 --mlp 2",
        "decoalesce llama/ wide/ --width 2 --noise 10 --seed 1",
        "decoalesce llama/ deep/ --layers 2 --new-layers zero",
        "decoalesce llama/ solar/ --layers 0:24,8:32",
    )

    new_layers: Literal["copy", "zero"] | None = option(
        default=None,
        help="zero: added layers are zero-initialised (identity) layers, the function stays.  "
        "[default: copy; zero for --layers llama-pro]",
        group=HOW,
        kind=Choice("copy", "zero"),
    )
    head_dim: int | None = option(
        default=None,
        help="New size of a head, where positions are rotary.",
        group=HOW,
        kind=Whole(least=1),
        metavar="N",
    )
    noise: float | None = option(
        default=None,
        help="Noise so many dB below the weights that read copies, adding up to 0 over these: the "
        "function stays, and training tells copies apart. 10 is usual (HyperCloning).",
        group=LEARN,
        kind=NOISE,
        metavar="DB",
    )
    seed: int | None = option(
        default=None,
        help="Which noise.  [default: 0]",
        group=LEARN,
        kind=Whole(),
        metavar="N",
    )
    split: SplitLike | None = option(
        default=None,
        help="Shares of copies in what reads them: 0.7 (of what the copies before leave), "
        "0.5,0.3,0.2, or remainder (as groups have them). The stored parts add up to the source's "
        "numbers, to the bit where that can be.",
        group=LEARN,
        kind=SplitOf(),
        metavar="S",
    )
    blend_with: PlanLike | None = option(
        default=None,
        help="Blend the grown model with this checkpoint, in the same pass.",
        group=BLEND,
        kind=Input(),
        metavar="BIG",
    )
    alpha: SettingLike | None = option(
        default=None,
        help="Weight of the grown model in the blend, as interpolate takes it.  [default: 0.5]",
        group=BLEND,
        kind=Alpha(),
        metavar="A",
    )

    def __post_init__(self) -> None:
        """The base's checks; an alpha says how much of a blend, so there must be one."""
        super().__post_init__()
        if self.alpha is not None and self.blend_with is None:
            raise PlanError("--alpha needs --blend-with BIG", hint="give both, or neither")
        if "seed" in self._apart and "noise" not in self._apart:
            raise PlanError("--seed needs --noise DB", hint="give both, or neither")

    @property
    def _apart(self) -> dict[str, Any]:
        """What tells copies apart, by name; options win over what a scheme says."""
        said = {} if self.groups is None else self.groups.copies
        given = {"noise": self.noise, "seed": self.seed, "split": self.split}
        return {**said, **{name: one for name, one in given.items() if one is not None}}

    @property
    def copies(self) -> "Copies":
        """What tells copies apart."""
        from streammap.operators.resize_parts import Copies

        asked = self._apart
        return Copies(asked.get("noise"), asked.get("seed", 0), asked.get("split"))

    def completed(self, source: "Plan", *, blend_with: "Plan | None" = None) -> "Decoalesce":
        """With the map that is not beside the source, but where a trainer leaves it."""
        from streammap.operators import map_lookup

        if self.head_dim is not None:
            return self
        return map_lookup.completed(self, source, self._target(blend_with))

    def _target(self, blend_with: "Plan | None") -> Mapping[str, int] | None:
        """Sizes that the result must have."""
        if self.target_sizes is None and blend_with is not None:
            return blend_with.model.sizes
        return self.target_sizes

    def plan(self, source: "Plan", *, blend_with: "Plan | None" = None) -> "Plan":
        """The larger model, blended where a checkpoint is given for it: it has its sizes then.

        Raises:
            SchemeError: groups that do not fit the model.
            PlanError: nothing to do, or a request that makes no sense.
        """
        from streammap.operators import resize_plan

        # Of two models, --untie is for each whose head is tied.
        unties_other = self.untie and blend_with is not None and blend_with.model.tied
        growth = replace(self, untie=False) if unties_other and not source.model.tied else self
        grown = resize_plan.plan(
            growth,
            source,
            self._target(blend_with),
            grows=True,
            head_dim=self.head_dim,
            new_layers=self.new_layers,
            blends=blend_with is not None,
            copies=self.copies,
        )
        if blend_with is None:
            return grown
        from streammap.operators.interpolate import Interpolate

        alpha = 0.5 if self.alpha is None else self.alpha
        blend = Interpolate(target=blend_with, alpha=alpha, untie=unties_other)
        return blend.plan(grown, target=blend_with)
