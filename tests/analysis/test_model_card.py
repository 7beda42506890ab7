"""The card names the paper where its operators were used, and nowhere else."""

from pathlib import Path

import pytest

import streammap
from streammap.analysis import model_card
from streammap.api import LazyCheckpoint
from streammap.engine.options import Engine
from streammap.operators.ordering.permute import Permute
from tests.support import tiny

SIZES = tiny.Sizes(heads=4, layers=4)


@pytest.fixture
def source(tmp_path: Path) -> LazyCheckpoint:
    tiny.write(tmp_path / "bert", tiny.bert(SIZES), tiny.bert_config(SIZES))
    return streammap.open(tmp_path / "bert")


def card(lazy: LazyCheckpoint) -> str:
    return model_card.card(lazy.plan, Engine(), name="org/mine")


def test_what_the_paper_describes_cites_it(source: LazyCheckpoint) -> None:
    for lazy in (
        source.coalesce(width=2),
        source.decoalesce(width=2),
        source.interpolate(source, alpha=0.5),
    ):
        assert "arxiv.org/abs/2404.07999" in card(lazy)
        assert "- arxiv:2404.07999" in card(lazy)


def test_a_plain_copy_and_other_operators_do_not(source: LazyCheckpoint) -> None:
    copied = card(source)
    assert "2404.07999" not in copied
    assert "## Steps" not in copied
    permuted = card(LazyCheckpoint(Permute(seed=1).plan(source.plan)))
    assert "2404.07999" not in permuted
    assert "## Steps\n\n- permute (seed: 1)\n\nGuarantee: **exact**" in permuted
