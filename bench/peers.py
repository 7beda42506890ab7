"""streammap compared with mergekit, and with the original tools' way of computing.

    python -m bench.peers [--runs 5] [--folder DIR] [--quick] [--no-mergekit]

Prints whole processes, nothing subtracted: wall and CPU seconds, peak memory, and the ratios of
streammap to the other (rounds' medians). mergekit is installed once, in FOLDER/mergekit, a virtual
environment of its own that stays there; where that fails, its rows are left out. The original's way
(bench/original.py) runs on GPT-2 medium beside `streammap map --opt C`, and their results are
compared.
"""

import argparse
from pathlib import Path

from bench import harness, models
from bench.harness import IMPORT, PYTHON, STREAMMAP, Command, Options, decimals, megabytes

_LINEAR = """merge_method: linear
dtype: bfloat16
models:
  - model: {b}
    parameters: {{weight: 0.7}}
  - model: {a}
    parameters: {{weight: 0.3}}
"""
_THREE = """merge_method: linear
dtype: bfloat16
models:
  - model: {a}
    parameters: {{weight: [{{filter: mlp, value: [0.2, 0.5]}}, {{value: 0.4}}]}}
  - model: {b}
    parameters: {{weight: 0.4}}
  - model: {c}
    parameters: {{weight: 0.2}}
"""
_TWICE = """merge_method: passthrough
dtype: bfloat16
slices:
  - sources: [{{model: {a}, layer_range: [0, {n}]}}]
  - sources: [{{model: {a}, layer_range: [0, {n}]}}]
"""
_SLERP = """merge_method: slerp
dtype: bfloat16
base_model: {a}
models: [{{model: {a}}}, {{model: {b}}}]
parameters: {{t: [{{filter: self_attn, value: [0, 0.5, 1]}}, {{value: 0.3}}]}}
"""
_TIES = """merge_method: ties
dtype: bfloat16
base_model: {c}
models:
  - model: {a}
    parameters: {{density: 0.5, weight: 0.6}}
  - model: {b}
    parameters: {{density: 0.5, weight: 0.4}}
parameters: {{normalize: true}}
"""
_COMPARE = """
import sys
from safetensors import safe_open
with safe_open(sys.argv[1], "pt") as one, safe_open(sys.argv[2], "pt") as two:
    keys, other = set(one.keys()), set(two.keys())
    assert keys == other, sorted(keys ^ other)[:5]
    print(max((one.get_tensor(k) - two.get_tensor(k)).abs().max().item() for k in keys))
"""
PAIRS = (
    ("linear blend", "mergekit linear", "streammap interpolate"),
    ("linear blend of 3", "mergekit linear of 3", "streammap blend, linear of 3"),
    ("slerp", "mergekit slerp", "streammap blend, slerp"),
    ("ties", "mergekit ties", "streammap blend, ties"),
    ("depth x 2", "mergekit passthrough", "streammap decoalesce --depth 2"),
    ("GPT-2 medium", "original's way, dense", "streammap map --opt C"),
)


def merges(kit: Path, folder: Path, *, quick: bool) -> dict[str, Command]:
    """mergekit's runs and streammap's, on two Llamas, and on three."""
    size = 0.2e9 if quick else 1.5e9
    model = models.llama_of(size, largest=size / 12)
    a, b, c = (models.make(folder / n, model, seed=i) for i, n in enumerate("abc"))
    three = [models.weights(path)[0] for path in (a, b, c)]
    sources, out = three[:2], folder / "out"
    nbytes = models.nbytes(model)
    flags = (out, "--no-copy-tokenizer", "--no-write-model-card", "--quiet")
    end = ("--no-fsync", "--quiet")
    made = {}
    for title, text, more in (
        ("linear", _LINEAR, ()),
        ("linear of 3", _THREE, ()),
        ("slerp", _SLERP, ()),
        ("ties", _TIES, ()),
        ("passthrough", _TWICE, ("--clone-tensors",)),
    ):
        config = folder / f"mergekit-{title.replace(' ', '-')}.yml"
        config.write_text(text.format(a=a, b=b, c=c, n=model.layers))
        read, written = three if "{c}" in text else sources, nbytes * (2 if text == _TWICE else 1)
        made[f"mergekit {title}"] = Command((kit, config, *flags, *more), (out,), read, written)
        ours = f"streammap blend, {title}"
        if any(ours == name for _, _, name in PAIRS):
            recipe = (*STREAMMAP, "blend", config, "-o", out, *end)
            made[ours] = Command(recipe, (out,), read, written)
    blend = (*STREAMMAP, "interpolate", a, b, out, "--alpha", 0.3, *end)
    deepen = (*STREAMMAP, "decoalesce", a, out, "--depth", 2, *end)
    made["streammap interpolate"] = Command(blend, (out,), sources, nbytes)
    made["streammap decoalesce --depth 2"] = Command(deepen, (out,), sources[:1], 2 * nbytes)
    return made


def originals(folder: Path, *, quick: bool) -> tuple[dict[str, Command], float]:
    """The original's way and the drop-in front; the largest difference of their results."""
    big, small = models.GPT2(24, 16), models.GPT2(12, 8)
    if quick:
        big, small = models.GPT2(4, 8), models.GPT2(2, 4)
    source = models.make(folder / "gpt2", big)
    target = models.write_config(folder / "gpt2-small", small)
    scheme = folder / "scheme.json"
    heads = (*STREAMMAP, "scheme", "--heads", big.heads, "--layers", big.layers)
    scheme.write_text(harness.run(heads).said)
    weights, out, plain = models.weights(source)[0], folder / "out", folder / "plain.safetensors"
    written = models.nbytes(small)
    front = (
        *STREAMMAP,
        "map",
        "--arch",
        "gpt2",
        "--opt",
        "C",
        "--src-dir",
        source,
        "--tgt-dir",
        target,
        "--config",
        scheme,
        "--save-dir",
        out,
        "--quiet",
    )
    dense = (PYTHON, "-m", "bench.original", weights, scheme, plain)
    harness.run(dense)
    harness.run(front)
    said = harness.run((PYTHON, "-c", _COMPARE, plain, out / "model.safetensors")).said
    return {
        "original's way, dense": Command(dense, (plain,), [weights], written),
        "streammap map --opt C": Command(front, (out,), [weights], written),
        "cp of GPT-2 medium": Command(
            ("cp", weights, folder / "copy"), (folder / "copy",), [weights], models.nbytes(big)
        ),
    }, float(said)


def add(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument("--no-mergekit", action="store_true", help="leave mergekit out")


def main(options: Options) -> None:
    """Install, make, run, print."""
    harness.need(options.folder, 12e9)
    folder = options.folder
    kit = (
        None
        if options.given.no_mergekit
        else harness.peer(folder.parent, "mergekit", "mergekit-yaml")
    )
    commands = {"import torch": Command(IMPORT)}
    about = ""
    if kit is not None:
        find = "from importlib.metadata import version; print(version('mergekit'))"
        about = f"mergekit {harness.run((kit.with_name('python'), '-c', find)).said.strip()}, "
        commands["mergekit --help"] = Command((kit, "--help"))
        commands |= merges(kit, folder, quick=options.quick)
    more, difference = originals(folder, quick=options.quick)
    results = harness.alternate(commands | more, options.runs)
    harness.print_head(
        "Beside others: whole processes, nothing subtracted",
        options.runs,
        "warm cache",
        "fsync by `streammap map` only",
    )
    print(
        f"{about}two bf16 Llamas of {'0.2' if options.quick else '1.5'} GB; GPT-2 in float32: "
        f"results differ by {difference:.1e} at most"
    )
    rows = []
    for title in results.runs:
        other = next((theirs for _, theirs, ours in PAIRS if ours == title), None)
        ratios = [
            decimals(results.ratio(title, other, what=what)) if other in results.runs else ""
            for what in ("wall", "cpu", "peak")
            if other is not None
        ] or ["", "", ""]
        rows.append(
            (
                title,
                decimals(results.wall(title)),
                decimals(results.cpu(title)),
                megabytes(results.peak(title)),
                *ratios,
            )
        )
    columns = ("", "wall s", "CPU s", "peak MB", "wall ratio", "CPU ratio", "peak ratio")
    harness.print_table(columns, rows)


if __name__ == "__main__":
    with harness.options(__doc__, add) as given:
        main(given)
