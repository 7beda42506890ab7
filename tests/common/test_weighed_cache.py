"""A cache that is bounded by the weight of its entries."""

from streammap.common.weighed_cache import WeighedCache


def test_old_entries_go_when_there_are_many_or_they_are_heavy() -> None:
    made: list[str] = []
    cache = WeighedCache[str](most=3, heaviest=10, weight=len)

    def ask(text: str) -> str:
        def make() -> str:
            made.append(text)
            return text

        return cache.of(text, make)

    for text in ("a", "b", "a", "c", "d", "a"):
        assert ask(text) == text
    assert made == ["a", "b", "c", "d"]  # b was the oldest of four
    ask("x" * 9)  # with it, only one of weight 1 has room
    assert [ask("a"), ask("d")] == ["a", "d"]
    assert made[-2:] == ["x" * 9, "d"]
    ask("y" * 30)  # too heavy, but kept until the next comes
    ask("y" * 30)
    assert made.count("y" * 30) == 1
