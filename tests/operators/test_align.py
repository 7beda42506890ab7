"""Units in another model's order, beside dense float64: copies that were shuffled by hand, and the
best order by trying all.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import streammap
from streammap.engine.options import Engine
from streammap.engine.searching import descent, settle, similarity
from streammap.errors import OutputError, PlanError
from streammap.output import place
from streammap.planning import map_file
from streammap.planning.map_file import MapLevel
from streammap.planning.ordering import assignment
from streammap.planning.ordering.search import OrderSearch
from streammap.planning.ordering.units import Movable
from tests.support import tiny
from tests.support.typed import ok, run

scipy = pytest.importorskip("scipy.optimize")

EMBED, HEADS, KV, DIM, MLP, LAYERS, VOCAB = 12, 4, 2, 4, 10, 2, 17
CONFIG: tiny.Config = {
    "model_type": "llama",
    "hidden_size": EMBED,
    "intermediate_size": MLP,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": DIM,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
}
AT = "model.layers.{}."


def llama(seed: int) -> tiny.State:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, EMBED),
        "lm_head.weight": (VOCAB, EMBED),
        "model.norm.weight": (EMBED,),
    }
    for i in range(LAYERS):
        at = AT.format(i)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}{norm}.weight"] = (EMBED,)
        for name, n in (("q", HEADS), ("k", KV), ("v", KV)):
            shapes[f"{at}self_attn.{name}_proj.weight"] = (n * DIM, EMBED)
        shapes[f"{at}self_attn.o_proj.weight"] = (EMBED, HEADS * DIM)
        for name in ("gate", "up"):
            shapes[f"{at}mlp.{name}_proj.weight"] = (MLP, EMBED)
        shapes[f"{at}mlp.down_proj.weight"] = (EMBED, MLP)
    return {key: x.double() for key, x in tiny.random(shapes, seed=seed).items()}


def shuffled(state: tiny.State, seed: int, *, negates: bool = True) -> tiny.State:
    """The same function: hidden units, and in each layer neurons and heads, at other places."""
    source = torch.Generator().manual_seed(seed)
    hidden = torch.randperm(EMBED, generator=source)
    sign = torch.randint(0, 2, (EMBED,), generator=source).mul(2).sub(1).double()
    sign = sign if negates else sign.abs()
    made = {}
    for key, x in state.items():
        if x.dim() == 1:
            made[key] = x[hidden]  # a gain takes no sign
        elif x.shape[1] == EMBED:
            made[key] = x[:, hidden] * sign
        else:
            made[key] = x[hidden] * sign[:, None]
    for i in range(LAYERS):
        at = AT.format(i)
        neurons = torch.randperm(MLP, generator=source)
        kv = torch.randperm(KV, generator=source)
        group = HEADS // KV
        heads = torch.cat([k * group + torch.randperm(group, generator=source) for k in kv])
        for name in ("gate", "up"):
            made[f"{at}mlp.{name}_proj.weight"] = made[f"{at}mlp.{name}_proj.weight"][neurons]
        key = f"{at}mlp.down_proj.weight"
        made[key] = made[key][:, neurons]
        for name, order in (("q", heads), ("k", kv), ("v", kv)):
            key = f"{at}self_attn.{name}_proj.weight"
            made[key] = made[key].view(-1, DIM, EMBED)[order].reshape(-1, EMBED)
        key = f"{at}self_attn.o_proj.weight"
        made[key] = made[key].view(EMBED, HEADS, DIM)[:, heads].reshape(EMBED, -1)
    return {key: x.contiguous() for key, x in made.items()}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A model, and a shuffled copy."""
    state = llama(0)
    return (
        tiny.write(tmp_path / "a", state, CONFIG),
        tiny.write(tmp_path / "b", shuffled(state, 1), CONFIG),
    )


@pytest.fixture
def apart(tmp_path: Path) -> tuple[Path, Path]:
    """Two models."""
    return tuple(tiny.write(tmp_path / f"m{i}", llama(i), CONFIG) for i in range(2))  # type: ignore[return-value]


@pytest.fixture
def no_search(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def refuse() -> None:
        def find(search: OrderSearch, *, reader: object) -> MapLevel:
            raise AssertionError("searched again")

        monkeypatch.setattr(descent, "find", find)

    return refuse


def refused(*words: object) -> str:
    said = run(*words)
    assert said.exit_code == 1, said.output
    return said.output


def test_a_shuffled_copy_blended_with_its_model_is_the_model(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    said = ok("blend", *pair, "-o", tmp_path / "out", "--weights", "0.5,0.5", "--align")
    assert "12 hidden units" in said
    assert "negated" in said
    assert "weights 0.5 (a) + 0.5 (b) = 1" in said
    state = tiny.written(pair[0])
    made = tiny.written(tmp_path / "out")
    for key, x in state.items():
        torch.testing.assert_close(made[key], x, rtol=0, atol=1e-12)
    assert not torch.allclose(tiny.written(pair[1])["lm_head.weight"], state["lm_head.weight"])
    tiny.assert_same(dict(streammap.blend(*pair, align=True).tensors()), made)
    tiny.assert_same(dict(streammap.open(pair[1]).align(pair[0]).tensors()), state)


def test_it_comes_before_the_option_too_and_serves_interpolation(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """What follows --align is its value only where it names axes."""
    ok("interpolate", "--alpha", "0.5", "--align", *pair, tmp_path / "out")
    state = tiny.written(pair[0])
    tiny.assert_same(tiny.written(tmp_path / "out"), state)
    streammap.align(pair[1], pair[0], tmp_path / "alone", fsync=False)
    tiny.assert_same(tiny.written(tmp_path / "alone"), state)


def test_all_are_brought_beside_a_base(pair: tuple[Path, Path]) -> None:
    a, b = pair
    made = streammap.blend(b, b, base=a, align=True, weights=[0.5, 0.25])
    state = tiny.written(a)
    for key, x in made.tensors():
        torch.testing.assert_close(x, state[key], rtol=0, atol=1e-12)


def similarities(a: tiny.State, b: tiny.State, layer: int) -> Tensor:
    """Of MLP neurons, in dense float64."""
    at = AT.format(layer) + "mlp.{}_proj.weight"
    rows = sum(a[at.format(n)] @ b[at.format(n)].T for n in ("gate", "up"))
    down = at.format("down")
    return rows + a[down].T @ b[down]


@pytest.mark.parametrize("tile", [None, 7])
def test_neurons_have_the_best_of_all_orders(
    apart: tuple[Path, Path], tile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tile is not None:
        monkeypatch.setattr(similarity, "TILE", tile)
        monkeypatch.setattr(similarity, "HELD", 3 * tile)
    a, b = (tiny.written(path) for path in apart)
    made = dict(streammap.open(apart[1]).align(apart[0], axes="mlp").tensors())
    for i in range(LAYERS):
        order = scipy.linear_sum_assignment(similarities(a, b, i), maximize=True)[1]
        key = AT.format(i) + "mlp.up_proj.weight"
        assert torch.equal(made[key], b[key][torch.tensor(order)])
        key = AT.format(i) + "mlp.down_proj.weight"
        assert torch.equal(made[key], b[key][:, torch.tensor(order)])
        key = AT.format(i) + "self_attn.q_proj.weight"
        assert torch.equal(made[key], b[key])


def allowed_heads() -> list[tuple[int, ...]]:
    group = HEADS // KV
    inner = list(itertools.permutations(range(group)))
    return [
        tuple(k * group + j for k, own in zip(kv, chosen, strict=True) for j in own)
        for kv in itertools.permutations(range(KV))
        for chosen in itertools.product(inner, repeat=KV)
    ]


def test_heads_keep_their_kv_heads_in_the_best_order(apart: tuple[Path, Path]) -> None:
    a, b = (tiny.written(path) for path in apart)
    made = dict(streammap.open(apart[1]).align(apart[0], axes=["heads"]).tensors())
    for i in range(LAYERS):
        at = AT.format(i) + "self_attn.{}_proj.weight"

        def product(order: tuple[int, ...], at: str = at) -> float:
            """All of a layer's attention weights, with heads in this order, times the other's."""
            kv = [order[k * (HEADS // KV)] // (HEADS // KV) for k in range(KV)]
            total = 0.0
            for name, places in (("q", list(order)), ("k", kv), ("v", kv)):
                x, y = (s[at.format(name)].view(-1, DIM, EMBED) for s in (a, b))
                total += float((x * y[places]).sum())
            x, y = (s[at.format("o")].view(EMBED, HEADS, DIM) for s in (a, b))
            return total + float((x * y[:, list(order)]).sum())

        best = max(allowed_heads(), key=product)
        key = at.format("q")
        expected = b[key].view(-1, DIM, EMBED)[list(best)].reshape(-1, EMBED)
        assert torch.equal(made[key], expected)


def test_a_model_only_comes_nearer(apart: tuple[Path, Path]) -> None:
    a, b = (tiny.written(path) for path in apart)
    made = dict(streammap.open(apart[1]).align(apart[0]).tensors())

    def product(state: tiny.State) -> float:
        return sum(float((a[key] * x).sum()) for key, x in state.items())

    assert product(made) > product(b) + 10
    once = dict(streammap.open(apart[1]).align(apart[0], passes=1).tensors())
    assert product(made) >= product(once)
    unsigned = dict(streammap.open(apart[1]).align(apart[0], signs=False).tensors())
    assert not any(torch.equal(x, -b[key]) for key, x in unsigned.items())


@pytest.mark.parametrize("inside", [True, False])
def test_groups_are_assigned_with_what_is_in_them(inside: bool) -> None:
    """All orders that keep the groups together, tried."""
    torch.manual_seed(3)
    g, of_groups = torch.randn(6, 6).double(), torch.randn(3, 3).double()
    movable = Movable("heads", None, 6, 3, ("kv",), inside)
    inner = [(0, 1), (1, 0)] if inside else [(0, 1)]
    orders = [
        tuple(k * 2 + j for k, own in zip(kv, chosen, strict=True) for j in own)
        for kv in itertools.permutations(range(3))
        for chosen in itertools.product(inner, repeat=3)
    ]

    def worth(order: tuple[int, ...]) -> float:
        kv = [order[2 * i] // 2 for i in range(3)]
        return float(g[range(6), order].sum() + of_groups[range(3), kv].sum())

    assert assignment.best(movable, g.clone(), of_groups) == max(orders, key=worth)


def test_what_was_found_is_in_the_record(
    apart: tuple[Path, Path], tmp_path: Path, no_search: Callable[[], None]
) -> None:
    out = tmp_path / "out"
    ok("blend", *apart, "-o", out, "--align", "--no-fsync")
    record = json.loads((out / "streammap.json").read_text())
    assert "align" not in record["request"]
    assert record["request"]["others"][0]["operator"] == "align"
    assert record["request"]["others"][0]["like"] == record["request"]["source"]
    no_search()
    assert "verdict  ok" in ok("verify", out, "--recompute", "20", "--no-class-check")
    ok("apply", out, tmp_path / "again", "--no-fsync")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        out / "model.safetensors"
    ).read_bytes()


def test_a_request_without_maps_is_searched_for(pair: tuple[Path, Path]) -> None:
    opened = [{"operator": "open", "path": str(path)} for path in pair]
    other = {"operator": "align", "source": opened[1], "like": opened[0]}
    asked = {"operator": "blend", "source": opened[0], "others": [other]}
    tiny.assert_same(dict(streammap.open_request(asked).tensors()), tiny.written(pair[0]))
    asked = {"operator": "blend", "source": opened[0], "others": [opened[1]], "align": ["mlp"]}
    assert streammap.open_request(asked).plan.pending is not None


def test_a_plan_tells_the_search_and_reads_nothing(
    apart: tuple[Path, Path], no_search: Callable[[], None]
) -> None:
    no_search()
    said = ok("plan", "blend", *apart, "--align")
    assert "1 to 10 passes, each reads" in said
    assert "12 x 12 similarities take" in said
    assert "take the order of m0; hidden units may change their sign" in said
    with pytest.raises(PlanError, match="needs a search first"):
        streammap.open(apart[1]).align(apart[0]).plan.check_settled()


def test_a_run_that_goes_on_does_not_search_again(
    apart: tuple[Path, Path], tmp_path: Path, no_search: Callable[[], None]
) -> None:
    """What a run leaves that was killed after its search, before anything else was durable."""
    out, work = tmp_path / "out", tmp_path / "out/.streammap-run"
    planned = streammap.blend(*apart, align=True)
    settle.settled(planned.plan, Engine(), folder=work)
    (found,) = work.iterdir()
    other = tmp_path / "other/.streammap-run"
    other.mkdir(parents=True)
    (other / found.name).write_bytes(b"damaged")
    ok("blend", *apart, "-o", tmp_path / "other", "--align", "--no-fsync")
    assert not other.exists()
    no_search()
    ok("blend", *apart, "-o", out, "--align", "--no-fsync")
    assert not work.exists()
    tiny.assert_same(tiny.written(out), tiny.written(tmp_path / "other"))
    work.mkdir()
    (work / found.name).write_bytes(b"damaged")
    said = run("blend", *apart, "-o", out, "--align", "--overwrite", "--restart")
    assert isinstance(said.exception, AssertionError)


def test_a_run_that_fails_after_its_search_leaves_nothing(
    apart: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "check_room", _no_room)
    said = refused("blend", *apart, "-o", tmp_path / "new/out", "--align")
    assert "no room" in said
    assert not (tmp_path / "new").exists()


def _no_room(path: Path, *, needed: int, written: int) -> None:
    raise OutputError("no room")


def test_plans_are_aligned_as_files_are(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """What is read is computed then."""
    small = [streammap.open(path).coalesce(layers=2) for path in pair]
    for name, lazy in zip("ab", small, strict=True):
        lazy.save(tmp_path / f"small-{name}", fsync=False)
    saved = streammap.open(tmp_path / "small-b").align(tmp_path / "small-a")
    tiny.assert_same(dict(small[1].align(small[0]).tensors()), dict(saved.tensors()))
    chain = small[1].align(small[0], axes="hidden").align(small[0], axes="mlp").coalesce(mlp=2)
    assert chain.plan.pending is not None
    assert chain.settled().plan.pending is None
    assert chain.read("model.layers.0.mlp.up_proj.weight").shape == (MLP // 2, EMBED)


def test_maps_can_be_given(pair: tuple[Path, Path], tmp_path: Path) -> None:
    search = streammap.open(pair[1]).align(pair[0]).plan.pending
    assert search is not None
    (sought,) = search.searches
    assert isinstance(sought, OrderSearch)
    level = descent.find(sought, reader="pread")
    file = tmp_path / "order.map.safetensors"
    file.write_bytes(map_file.encode((level,)))
    ok("align", pair[1], pair[0], tmp_path / "out", "--map", file, "--no-fsync")
    tiny.assert_same(tiny.written(tmp_path / "out"), tiny.written(pair[0]))
    stands = sought.stand_in()
    odd: dict[str, Any] = {"no map of mlp": {}, "torn": stands.by_layer}
    odd["torn"] = {**stands.by_layer, "heads": {**stands.by_layer["mlp"]}}
    for by_layer in odd.values():
        file.write_bytes(map_file.encode((MapLevel(stands.merging, by_layer=by_layer),)))
        said = refused("align", pair[1], pair[0], tmp_path / "not", "--map", file)
        assert "error: align: " in said
        assert not (tmp_path / "not").exists()


def test_what_can_not_be_aligned_is_refused_by_name(
    apart: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = apart
    out = tmp_path / "out"
    said = refused("blend", a, b, "-o", out, "--align=nose")
    assert "m1: align: llama has no axis 'nose'" in said
    assert "hidden, heads, kv_heads, mlp" in said
    said = refused("align", b, a, out, "--axes", "vocab")
    assert "align: vocab of llama keeps its order" in said
    said = refused("blend", a, b, "-o", out, "--align", "--slices", "[[0, 0, 1], [1, 1, 2]]")
    assert "--align and --slices" in said
    assert "--align: one checkpoint" in refused("blend", a, "-o", out, "--align")
    wide = {**CONFIG, "intermediate_size": 5}
    half = {k: x[:5] if "gate" in k or "up" in k else x for k, x in llama(2).items()}
    half = {k: x[:, :5].contiguous() if "down" in k else x for k, x in half.items()}
    tiny.write(tmp_path / "half", half, wide)
    assert "mlp: 5 here, 10 in the model to align with" in refused(
        "align", tmp_path / "half", a, out
    )
    assert not out.exists()


def test_too_little_memory_is_refused_with_what_is_enough(apart: tuple[Path, Path]) -> None:
    planned = streammap.blend(*apart, align=True)
    with pytest.raises(OutputError, match=r"similarities of 12 x 12 units") as refused:
        planned.summary(memory="40MiB")
    least = str(refused.value.hint).split()[2].rstrip(",")
    assert planned.summary(memory=least).peak_nbytes <= int(least.removesuffix("MiB")) * 2**20
    with pytest.raises(OutputError, match="aligning takes at least"):
        planned.save("out", memory="40MiB")


def test_without_its_library_there_is_a_way_out(
    apart: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    said = refused("blend", *apart, "-o", tmp_path / "out", "--align")
    assert "this needs scipy" in said
    assert "pip install 'streammap-weights[align]'" in said
    assert not (tmp_path / "out").exists()


def test_signs_need_norms_that_allow_them(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """An RMSNorm's gain is kept as it is; a LayerNorm allows none."""
    made = streammap.open(pair[0]).permute(signed=True, seed=2, only=("embed",))
    norm, head = made.read("model.norm.weight"), made.read("lm_head.weight")
    old = tiny.written(pair[0])
    assert sorted(norm.tolist()) == sorted(old["model.norm.weight"].tolist())
    assert torch.equal(head.abs().sum(1), old["lm_head.weight"].abs().sum(1)) or torch.allclose(
        head.abs().sum(1), old["lm_head.weight"].abs().sum(1)
    )
    assert (head < 0).sum() != (old["lm_head.weight"] < 0).sum()
    sizes = tiny.Sizes(heads=2, layers=1)
    bert = tiny.write(tmp_path / "bert", tiny.bert(sizes), tiny.bert_config(sizes))
    assert "no units of bert may be negated" in refused(
        "permute", bert, tmp_path / "out", "--signed"
    )
    assert "sign" not in ok("plan", "align", bert, bert)
