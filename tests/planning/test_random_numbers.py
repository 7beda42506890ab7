"""Random numbers are those of the published generator, and a function of their place alone."""

import math
import statistics

import pytest
import torch

from streammap.planning.derived import random_numbers

# Known answers that come with the authors' library, Random123: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def _integers(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_known_answers(counter: str, key: str, answer: str) -> None:
    a, b = _integers(key)
    words = [torch.tensor([word, word]) for word in _integers(counter)]
    made = random_numbers.philox(words, (a, b))
    assert [x.tolist() for x in made] == [[word, word] for word in _integers(answer)]


def test_a_stream_is_philox_of_its_blocks_and_of_its_own_key() -> None:
    far = 2**34 + 8  # beyond what one word of the counter holds
    for start in (0, far):
        block = start // 4
        counter = [torch.tensor([x]) for x in (block % 2**32, block >> 32, 0, 0)]
        expected = torch.cat(random_numbers.philox(counter, random_numbers.key_of(7, "a")))
        assert torch.equal(random_numbers.words(7, "a", start, 4), expected)
    ten = random_numbers.words(7, "a", 0, 10)
    for other in (random_numbers.words(8, "a", 0, 10), random_numbers.words(7, "b", 0, 10)):
        assert not (ten == other).any()
    assert (random_numbers.words(-1, "a", 0, 10) != ten).all()


@pytest.mark.parametrize("make", ["words", "uniform", "normal"])
def test_any_part_has_the_bits_of_the_whole(make: str) -> None:
    draw = getattr(random_numbers, make)
    whole = draw(3, "layer.weight", 0, 1000)
    for start, n in [(0, 1), (1, 1), (3, 2), (5, 995), (998, 2), (7, 0)]:
        assert torch.equal(draw(3, "layer.weight", start, n), whole[start : start + n])


def test_uniform_numbers_are_even() -> None:
    x = random_numbers.uniform(0, "x", 0, 200_000)
    assert 0 <= x.min() < 1e-4
    assert 1 - 1e-4 < x.max() < 1
    counts = torch.histc(x, bins=64, min=0, max=1)
    chi_square = ((counts - 3125) ** 2 / 3125).sum()
    assert 25 < chi_square < 115  # 63 degrees of freedom: beyond these once in 100,000 seeds
    assert abs(float(torch.corrcoef(torch.stack([x[1:], x[:-1]]))[0, 1])) < 0.01


def test_normal_numbers_are_the_quantiles_of_uniform_ones() -> None:
    n = 20_000
    x = random_numbers.normal(5, "x", 0, n)
    places = (random_numbers.uniform(5, "x", 0, n) * 2**52).floor() + 0.5
    exact = statistics.NormalDist().inv_cdf
    expected = torch.tensor([exact(p * 2.0**-52) for p in places.tolist()], dtype=torch.float64)
    torch.testing.assert_close(x, expected, rtol=2e-14, atol=1e-15)
    assert abs(float(x.mean())) < 4 / math.sqrt(n)
    assert abs(float(x.var()) - 1) < 6 / math.sqrt(n)


def test_the_farthest_quantiles_are_finite_and_right() -> None:
    exact = statistics.NormalDist().inv_cdf
    x = torch.tensor([2.0**-53, 1e-12, 1e-5, 0.02, 0.074], dtype=torch.float64)
    r = (-random_numbers._log(x)).sqrt()
    torch.testing.assert_close(random_numbers._log(x), x.log(), rtol=1e-15, atol=0)
    far = random_numbers._ratio(r[:1] - 5.0, random_numbers._FAR)
    near = random_numbers._ratio(r[1:] - 1.6, random_numbers._TAIL)
    expected = torch.tensor([-exact(p) for p in x.tolist()], dtype=torch.float64)
    # In float64, 1 - 2^-53 is not told from its neighbours: the lower end is asked for.
    assert r[1] > 5
    torch.testing.assert_close(far, expected[:1], rtol=1e-13, atol=0)
    torch.testing.assert_close(near[1:], expected[2:], rtol=1e-13, atol=0)


def test_places_are_chosen_with_their_probability() -> None:
    n = 100_000
    for p in (0.0, 0.1, 0.5, 1.0):
        chosen = random_numbers.keeps(1, "x", 0, n, p)
        assert abs(float(chosen.double().mean()) - p) <= 4 * math.sqrt(p * (1 - p) / n)
        each = torch.full((n,), p, dtype=torch.float64)
        assert torch.equal(random_numbers.keeps(1, "x", 0, n, each), chosen)
