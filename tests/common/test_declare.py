"""Options declared as fields: read, refused, written down, and taken by functions."""

import inspect
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammap.common import declare
from streammap.common.declare import argument, declared, option, takes
from streammap.common.kinds import Anything, Names, Real, Table, Whole
from streammap.errors import PlanError


@declared
class Base:
    """What several have."""

    size: int = option(default=4, help="A size.", kind=Whole(least=1), metavar="N")
    sync: bool = option(default=True, help="Wait.", off="Do not wait.")


@declared
class Paint(Base):
    """Paint something."""

    wall: str = argument(help="Which wall.", metavar="WALL", kw_only=False)
    color: Literal["red", "blue"] = option(help="Which color.")
    share: float = option(default=0.5, help="How much.", kind=Real(0.0, 1.0), json="part")
    words: tuple[str, ...] = option(default=(), help="Words.", kind=Names(), flag="word")
    about: dict[str, object] | None = option(default=None, help="More.", kind=Table())
    listener: object = option(default=None, help="Called.", kind=Anything())


def test_values_are_read_when_it_is_made() -> None:
    paint = Paint("north", color="red", share=1, words=["a", "b"])  # type: ignore[arg-type]
    assert (paint.wall, paint.share, paint.words) == ("north", 1.0, ("a", "b"))
    assert type(paint.share) is float
    with pytest.raises(AttributeError):
        paint.size = 3  # type: ignore[misc]


WRONG: tuple[tuple[dict[str, Any], str], ...] = (
    ({"color": "green"}, "color is 'green', expected red or blue"),
    ({"share": 2}, "share is 2, expected 0 to 1"),
    ({"share": float("nan")}, "share is nan, expected 0 to 1"),
    ({"share": False}, "share is False, expected 0 to 1"),
    ({"size": 0}, "size is 0, expected 1 or more"),
    ({"size": True}, "size is True, expected a whole number"),
    ({"size": 2.0}, "size is 2.0, expected a whole number"),
    ({"size": 10**5000}, "size is a huge number, expected a whole number"),
    ({"sync": 1}, "sync is 1, expected true or false"),
    ({"words": "ab"}, "words is 'ab', expected a list of names"),
    ({"about": [1]}, r"about is \[1\], expected an object"),
    ({"wall": "a\0b"}, "wall is .*, expected text"),
    ({"wall": 3}, "wall is 3, expected text"),
)


@pytest.mark.parametrize(("given_", "message"), WRONG)
def test_a_wrong_value_is_refused_by_name(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        declare.make(Paint, {"wall": "north", "color": "red"} | given_)


def test_unknown_and_missing_names_are_refused() -> None:
    with pytest.raises(PlanError, match=r"paint: unknown option 'colour'\n.*did you mean color"):
        declare.make(Paint, {"colour": "red"}, what="paint")
    with pytest.raises(PlanError, match=r"unknown option 'x'\n.*known: size, sync, wall"):
        declare.make(Paint, {"x": 1})
    with pytest.raises(PlanError, match=r"paint: color is missing\n.*give --color"):
        declare.make(Paint, {"wall": "north"}, what="paint")
    assert declare.make(Paint, {"wall": "a", "color": "red", "size": None}).size == 4


def test_json_holds_what_is_not_the_default() -> None:
    assert declare.encode(Paint("north", color="red")) == {"wall": "north", "color": "red"}
    paint = Paint("north", color="blue", share=0.25, words=("a",), about={"x": 1}, sync=False)
    content = declare.encode(paint)
    assert content == {
        "sync": False,
        "wall": "north",
        "color": "blue",
        "part": 0.25,
        "words": ("a",),
        "about": {"x": 1},
    }
    assert declare.decode(Paint, content, what="paint") == paint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"wall": "a", "color": "red", "share": 1}, "paint: unknown option 'share'"),
        ({"wall": "a", "color": "red", "listener": 1}, "paint: unknown option 'listener'"),
        ({"wall": "a"}, "paint: color is missing"),
        ({"wall": "a", "color": None}, "color is None"),
    ],
)
def test_json_that_does_not_fit_is_refused(content: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        declare.decode(Paint, content, what="paint")


_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(
    st.dictionaries(
        st.sampled_from(["wall", "color", "part", "words", "about", "size", "sync", "x"]), _ANY
    )
)
def test_any_json_is_read_or_refused(content: dict[str, object]) -> None:
    try:
        paint = declare.decode(Paint, content, what="paint")
    except PlanError:
        return
    assert declare.decode(Paint, declare.encode(paint), what="paint") == paint


@takes(Paint, leads=Base)
def painted(house: str, brush: str, options: Paint) -> tuple[str, str, Paint]:
    """Paint a house.

    Raises:
        PlanError: no.
    """
    return house, brush, options


def test_a_function_takes_options_by_name() -> None:
    expected = ("mine", "thick", Paint("north", color="red", size=2))
    assert painted("mine", "north", "thick", color="red", size=2) == expected  # arguments between
    assert painted(house="mine", brush="thick", wall="north", color="red", size=2) == expected  # type: ignore[call-arg]
    assert painted.__name__ == "painted"


def test_its_signature_and_help_name_all_options() -> None:
    parameters = inspect.signature(painted).parameters
    assert list(parameters)[:5] == ["house", "wall", "brush", "size", "sync"]
    assert parameters["size"].default == 4
    assert parameters["color"].default is inspect.Parameter.empty
    assert parameters["share"].kind is inspect.Parameter.KEYWORD_ONLY
    text = inspect.getdoc(painted)
    assert text is not None
    assert (
        text.index("Paint a house.") < text.index("    color: Which color.") < text.index("Raises:")
    )


def test_calls_that_do_not_fit_are_type_errors() -> None:
    call: Any = painted
    with pytest.raises(TypeError, match=r"painted.. takes 3 arguments by place"):
        call("a", "b", "c", "d", color="red")
    with pytest.raises(TypeError, match=r"painted.. got two values for 'house'"):
        call("a", "b", "c", house="x", color="red")
    with pytest.raises(TypeError, match=r"painted.. is missing 'brush'"):
        call("a", "b", color="red")
    with pytest.raises(PlanError, match="painted: unknown option 'colour'"):
        call("a", "b", "c", colour="red")


def test_a_part_has_only_its_own() -> None:
    base = declare.part(Base, Paint("north", color="red", size=2, sync=False))
    assert type(base) is Base
    assert base == Base(size=2, sync=False)


def test_flags_are_typed_as_the_command_line_has_them() -> None:
    flags = {one.name: declare.flag_of(one) for one in declare.options_of(Paint)}
    assert flags["sync"] == "--no-sync"
    assert flags["words"] == "--word"
    assert flags["wall"] == "WALL"


def test_an_annotation_that_says_no_kind_is_an_error() -> None:
    @declared
    class Odd:
        """Odd."""

        x: bytes = option(default=b"", help="?")

    with pytest.raises(TypeError, match="option x: give a kind"):
        Odd()
