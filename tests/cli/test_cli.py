"""Each command as a user types it."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import click
import pytest
import torch
from click.shell_completion import get_completion_class

import streammap
from streammap.cli.main import main
from streammap.operators import registry
from tests.support import tiny
from tests.support.typed import ok, run

SIZES = tiny.Sizes(heads=4, layers=4)


def refused(*arguments: object) -> str:
    """The message of a command that is refused: exit 1, nothing on stdout, no traceback."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture
def big(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "big", tiny.bert(SIZES), tiny.bert_config(SIZES))


def commands() -> list[tuple[str, click.Command]]:
    found: list[tuple[str, click.Command]] = []
    ctx = click.Context(main)
    for name in main.list_commands(ctx):
        command = main.get_command(ctx, name)
        assert command is not None
        found.append((name, command))
        if isinstance(command, click.Group):
            inner = [(one, command.get_command(ctx, one)) for one in command.list_commands(ctx)]
            found += [(f"{name} {one}", c) for one, c in inner if c is not None]
    return found


@pytest.mark.parametrize(("name", "command"), commands())
def test_each_command_has_help_with_an_example_of_itself(name: str, command: click.Command) -> None:
    said = ok(*name.split(), "--help")
    assert f"streammap {name}" in said
    assert "Examples:\n" in said
    assert "\\b" not in said
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.name}: no help"


def test_the_list_of_commands_has_the_first_line_of_each() -> None:
    said = " ".join(ok("--help").split())
    context = click.Context(main)
    operators = registry.commands()
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        if name in operators:
            assert f" {name} {operators[name]}" in said
        else:
            assert f" {name} {(command.help or '').splitlines()[0]}" in said


def test_help_imports_no_command() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from streammap.cli.main import main;"
        "CliRunner().invoke(main, ['--help']);"
        "print(*sorted(m for m in sys.modules if m.startswith('streammap.cli.')))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["streammap.cli.help", "streammap.cli.main"]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from streammap.cli.main import main;"
        "CliRunner().invoke(main, ['--help']);"
        "print([m for m in ('torch', 'numpy', 'huggingface_hub', 'tqdm') if m in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_planning_safetensors_does_not_import_torch(big: Path) -> None:
    code = (
        "import sys, streammap;"
        f"streammap.open({str(big)!r}).coalesce(width=2, depth=2).summary();"
        "print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"


def test_the_module_runs_as_a_program(big: Path) -> None:
    command = [sys.executable, "-m", "streammap", "inspect", str(big), "--json"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(said.stdout)["architecture"] == "bert"


def test_inspect(big: Path) -> None:
    said = ok("inspect", big)
    assert "architecture  bert" in said
    assert "heads 4" in said
    assert "encoder.layer.{layer}.output.dense.weight" in said
    content = json.loads(ok("inspect", big, "--json"))
    assert content["sizes"]["embed"] == 8
    assert content["n_tensors"] == len(tiny.bert(SIZES))


def test_inspect_says_when_no_spec_serves(tmp_path: Path) -> None:
    tiny.write(tmp_path / "x", {"a.b": torch.ones(2)}, {"model_type": "strange"})
    said = ok("inspect", tmp_path / "x")
    assert "architecture  none (no architecture spec serves model_type 'strange')" in said


def test_plan_says_what_would_happen_and_writes_nothing(big: Path, tmp_path: Path) -> None:
    said = ok("plan", "coalesce", big, tmp_path / "out", "--width", 2, "--depth", 2)
    assert not (tmp_path / "out").exists()
    row = next(line for line in said.splitlines() if "intermediate.dense.weight" in line)
    assert re.search(r"4 -> 2 +\[12, 8\] -> \[6, 4\]", row)
    assert "rows: mean of 2, columns: sum of 2, layers: mean of 2" in row
    assert "guarantee  approximate: coalesce: layers are merged" in said
    content = json.loads(ok("plan", "coalesce", big, "--width", 2, "--depth", 2, "--json"))
    assert content["sizes"]["layer"] == [4, 2]
    assert content["nbytes_read"] == sum(t.nbytes for t in tiny.bert(SIZES).values())
    assert content["promise"] == "approximate"
    assert content["peak_nbytes"] > 0


def test_what_the_plan_says_is_what_the_run_writes(big: Path, tmp_path: Path) -> None:
    planned = json.loads(ok("plan", "decoalesce", big, "--width", 2, "--json"))
    ran = json.loads(ok("decoalesce", big, tmp_path / "out", "--width", 2, "--json"))
    assert planned["promise"] == ran["promise"] == "exact"
    assert planned["n_tensors"] == ran["n_tensors"]
    assert planned["nbytes_read"] == ran["nbytes_read"]
    written = sum(t.nbytes for t in tiny.written(tmp_path / "out").values())
    assert planned["nbytes_written"] == written


def test_a_v_cycle_by_command_and_by_call_gives_the_same(big: Path, tmp_path: Path) -> None:
    ok("coalesce", big, tmp_path / "small", "--width", 2, "--depth", 2)
    ok("decoalesce", tmp_path / "small", tmp_path / "blended", "--blend-with", big, "--alpha", 0.25)
    ok("decoalesce", tmp_path / "small", tmp_path / "grown")
    ok("interpolate", tmp_path / "grown", big, tmp_path / "steps", "--alpha", 0.25)
    by_steps = tiny.written(tmp_path / "steps")
    tiny.assert_same(tiny.written(tmp_path / "blended"), by_steps)
    streammap.coalesce(big, tmp_path / "a", width=2, depth=2)
    tiny.assert_same(tiny.written(tmp_path / "a"), tiny.written(tmp_path / "small"))
    streammap.decoalesce(tmp_path / "a", tmp_path / "b", blend_with=big, alpha=0.25)
    tiny.assert_same(tiny.written(tmp_path / "b"), by_steps)
    streammap.interpolate(tmp_path / "grown", big, tmp_path / "c", alpha=0.25)
    tiny.assert_same(tiny.written(tmp_path / "c"), by_steps)
    lazy = streammap.open(big).coalesce(width=2, depth=2).decoalesce()
    blended = lazy.interpolate(streammap.open(big), alpha=0.25)
    tiny.assert_same(dict(blended.tensors()), by_steps)


def test_the_report_is_the_last_line(big: Path, tmp_path: Path) -> None:
    said = ok("coalesce", big, tmp_path / "out", "--width", 2)
    pattern = r"wrote 1 file, [\d.]+ kB in [\d.]+ s \(\d+ MB/s\), peak [\d.]+ [MG]B -> .*out"
    assert re.fullmatch(pattern, said.splitlines()[-1])
    assert ok("coalesce", big, tmp_path / "out2", "--width", 2, "--quiet") == ""


def test_scheme_prints_what_the_commands_take(big: Path, tmp_path: Path) -> None:
    said = ok("scheme", "--heads", 4, "--layers", 4, "--grouping", "adjacent")
    assert json.loads(said)["width_scheme"] == [[0, 1], [2, 3]]
    (tmp_path / "s.json").write_text(said)
    ok("coalesce", big, tmp_path / "a", "--scheme", tmp_path / "s.json")
    ok("coalesce", big, tmp_path / "b", "--width", 2, "--depth", 2, "--grouping", "adjacent")
    tiny.assert_same(tiny.written(tmp_path / "a"), tiny.written(tmp_path / "b"))


def test_shipped_schemes_are_what_scheme_prints() -> None:
    folder = Path(__file__).parents[2] / "schemes"
    flags = {
        "L6-H6": ("--heads", 12, "--layers", 12),
        "L6-H6-adjacent": ("--heads", 12, "--layers", 12, "--grouping", "adjacent"),
        "H6": ("--heads", 12),
        "L6": ("--layers", 12),
        "L6-adjacent": ("--layers", 12, "--grouping", "adjacent"),
        "L12-H8": ("--heads", 16, "--layers", 24),
        "L4-H4": ("--heads", 12, "--layers", 12, "--width", 3, "--depth", 3),
    }
    assert {path.stem for path in folder.glob("*.json")} == flags.keys()
    for name, options in flags.items():
        assert (folder / f"{name}.json").read_text() == ok("scheme", *options)


def test_usage_errors_exit_with_2(big: Path) -> None:
    for arguments in (
        ("coalesce", big),
        ("coalesce", big, "x", "--nonsense"),
        ("scheme",),
        ("coalesce", big, "x", "--rule", "other"),
        ("coalesce", big, "x", "--width", 0),
        ("coalesce", big, "x", "--head-dim", 8),
    ):
        assert run(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "no target size given"),
        (("--width", 3), "4 heads do not divide into groups of 3"),
        (("--width", 2, "--scheme", "schemes/L6-H6.json"), "both a scheme and --width"),
        (("--scheme", "schemes/L6-H6.json"), "is out of range, the large model has 4"),
        (("--scheme", "nowhere.json"), "nowhere.json: No such file"),
        (("--map", "nowhere.safetensors"), "no such map file"),
        (("--width", 2, "--config", "nowhere.json"), "nowhere.json: no such folder or file"),
        (("--width", 2, "--arch", "strange"), "no architecture 'strange'"),
        (("--width", 2, "--max-shard-size", "5 apples"), "size '5 apples'"),
    ],
)
def test_refusals(big: Path, tmp_path: Path, options: tuple[object, ...], message: str) -> None:
    root = Path(__file__).parents[2]
    given = [root / o if isinstance(o, str) and o.startswith("schemes/") else o for o in options]
    assert message in refused("coalesce", big, tmp_path / "out", *given)
    assert not (tmp_path / "out").exists()


def test_blending_another_model_is_refused(big: Path, tmp_path: Path) -> None:
    other = tiny.Sizes(heads=4, layers=2)
    tiny.write(tmp_path / "other", tiny.bert(other), tiny.bert_config(other))
    said = refused("interpolate", big, tmp_path / "other", tmp_path / "out", "--alpha", 0.5)
    assert "layer: source 4, target 2" in said
    for alpha in ("nan", 1.5, -0.1):
        said = refused("interpolate", big, big, tmp_path / "out", f"--alpha={alpha}")
        assert "expected 0 to 1" in said
        assert "see `streammap blend --help`" in said


def test_a_third_checkpoint_is_not_taken_for_a_place_to_write(big: Path, tmp_path: Path) -> None:
    third = tiny.write(tmp_path / "third", tiny.bert(SIZES, seed=3), tiny.bert_config(SIZES))
    before = tiny.tree(third)
    for command in (("plan", "interpolate"), ("interpolate",)):
        said = refused(*command, big, big, third, "--alpha", 0.5)
        assert f"{third}: already exists; interpolate reads SRC and TGT, and writes to OUT" in said
    assert tiny.tree(third) == before
    said = ok("plan", "interpolate", big, big, tmp_path / "out", "--alpha", 0.5)
    assert said.splitlines()[-1] == f"output     {tmp_path / 'out'}"
    said = ok("plan", "coalesce", big, third, "--width", 2)
    assert said.splitlines()[-1].endswith("third: already exists, a run needs --overwrite")
    assert "output" not in json.loads(ok("plan", "coalesce", big, third, "--width", 2, "--json"))
    ok("interpolate", big, big, third, "--alpha", 0.5, "--overwrite")


def test_an_error_is_the_json_object_that_a_script_reads(big: Path, tmp_path: Path) -> None:
    for code, words in (
        (1, ("coalesce", big, tmp_path / "out", "--width", 3, "--json")),
        (1, ("plan", "coalesce", big, "--layers", 48, "--json")),
        (1, ("inspect", tmp_path / "nowhere", "--json")),
        (1, ("verify", tmp_path / "nowhere", "--json")),
        (2, ("diff", big, tmp_path / "nowhere", "--json")),
        (1, ("spec", "verify", "strange", "--json")),
        (1, ("apply", tmp_path / "nowhere.json", tmp_path / "out", "--json")),
        (2, ("coalesce", big, tmp_path / "out", "--width", "wide", "--json")),
        (2, ("diff", big, "--json")),
    ):
        found = run(*words)
        assert found.exit_code == code, words
        error = json.loads(found.stdout)["error"]
        assert error["exit_code"] == code
        assert error["message"]
        assert error["message"].splitlines()[0] in found.stderr
        assert error["hint"] is None or error["hint"] in found.stderr
        assert error["kind"]
        plain = run(*words[:-1])
        assert (plain.exit_code, plain.stdout) == (code, "")


_INTERRUPTED = """
import sys
from streammap.cli import operators
from streammap.cli.main import main
from streammap.common.events import Started, Wrote

how = sys.argv.pop()

def save(lazy, title, values):
    bar = operators.listener(title, quiet=False)
    bar(Started(1, 100, 0))
    bar(Wrote("x", 50))
    if how == "stop":
        raise KeyboardInterrupt
    raise operators.OutputError("the disk is full")

operators.save = save
main()
"""


@pytest.mark.parametrize(("how", "message"), [("stop", "interrupted: "), ("fail", "error: ")])
def test_a_message_begins_a_line_behind_a_bar(big: Path, how: str, message: str) -> None:
    theirs, ours = pty.openpty()
    termios.tcsetwinsize(ours, (24, 100))
    words = ["coalesce", str(big), str(big.parent / "out"), "--width=2", how]
    command = [sys.executable, "-c", _INTERRUPTED, *words]
    process = subprocess.Popen(command, stderr=ours, stdout=subprocess.DEVNULL)
    os.close(ours)
    said = b""
    with contextlib.suppress(OSError):  # what a terminal says when its last user is gone
        while piece := os.read(theirs, 4096):
            said += piece
    os.close(theirs)
    assert process.wait() == (130 if how == "stop" else 1)
    assert b"coalesce:" in said
    before, found, _ = said.decode().partition(message)
    assert found
    last = before.rpartition("\n")[2].rpartition("\r")[2]
    assert last.strip() == "", before


def completions(*words: str, shell: str = "bash") -> list[str]:
    """What a shell offers for the last word."""
    typed = ["streammap", *words]
    env = {"COMP_WORDS": " ".join(typed), "COMP_CWORD": str(len(words))}
    complete = get_completion_class(shell)
    assert complete is not None
    with pytest.MonkeyPatch.context() as patched:
        for name, value in env.items():
            patched.setenv(name, value)
        made = complete(main, {}, "streammap", "_STREAMMAP_COMPLETE")
        return made.complete().splitlines()


@pytest.mark.parametrize(
    "words",
    [
        ("coalesce",),
        ("coalesce", "big"),
        ("coalesce", "big", "out", "--scheme"),
        ("decoalesce", "big", "out", "--map"),
        ("decoalesce", "big", "out", "--target"),
        ("decoalesce", "big", "out", "--blend-with"),
        ("coalesce", "big", "out", "--config"),
        ("coalesce", "big", "out", "--arch"),
        ("interpolate", "a"),
        ("plan", "coalesce"),
        ("inspect",),
        ("verify",),
        ("diff", "a"),
        ("diff", "a", "b", "--plot"),
        ("apply",),
        ("map", "--src-dir"),
        ("spec", "verify"),
        ("spec", "infer"),
        ("testbench", "--scheme"),
    ],
)
def test_shells_complete_files_where_files_go(words: tuple[str, ...]) -> None:
    assert completions(*words, "so") == ["file,so"]


def test_shells_complete_names_of_specs() -> None:
    assert completions("inspect", "big", "--arch", "gpt") == [
        "plain,gpt2",
        "plain,gpt_bigcode",
        "plain,gpt_neo",
        "plain,gpt_neox",
        "plain,gpt_oss",
        "file,gpt",
    ]


def test_a_missing_and_a_surplus_tensor_are_named(big: Path, tmp_path: Path) -> None:
    state = tiny.bert(SIZES)
    less = {key: t for key, t in state.items() if key != "pooler.dense.bias"}
    tiny.write(tmp_path / "less", less, tiny.bert_config(SIZES))
    said = refused("interpolate", tmp_path / "less", big, tmp_path / "out", "--alpha", 0.5)
    assert "the source lacks pooler.dense.bias (1 missing, 0 surplus" in said
    said = refused("interpolate", big, tmp_path / "less", tmp_path / "out", "--alpha", 0.5)
    assert "has pooler.dense.bias, which the target lacks" in said


def test_traceback_is_shown_on_request(tmp_path: Path) -> None:
    result = run("--traceback", "inspect", tmp_path / "nothing")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr


def test_a_scheme_on_the_way_up_knows_the_large_model_that_was_there(
    big: Path, tmp_path: Path
) -> None:
    """Its last head is in no group, so that the scheme alone does not tell how many there were."""
    file = tmp_path / "s.json"
    file.write_text('{"width_scheme": [[0, 1], [2]]}')
    ok("coalesce", big, tmp_path / "small", "--scheme", file)
    ok("decoalesce", tmp_path / "small", tmp_path / "saved")
    ok("decoalesce", tmp_path / "small", tmp_path / "given", "--scheme", file)
    tiny.assert_same(tiny.written(tmp_path / "given"), tiny.written(tmp_path / "saved"))
    assert streammap.open(tmp_path / "given").sizes["heads"] == 4
    said = ok("decoalesce", tmp_path / "small", tmp_path / "other", "--width", 2)
    assert "the map saved with the source is another one; it is not used" in said
    said = refused(
        "decoalesce",
        tmp_path / "small",
        tmp_path / "x",
        "--scheme",
        file,
        "--map",
        tmp_path / "small",
    )
    assert "both a map file and a scheme" in said


def test_commands_that_hints_name_are_there() -> None:
    package = Path(streammap.__file__).parent
    named = {
        word
        for path in package.rglob("*.py")
        for hint in re.findall(r"hint=[^)]*", path.read_text())
        for word in re.findall(r"streammap ([a-z][a-z-]+)", hint)
    }
    assert "inspect" in named
    assert named <= {*main.list_commands(click.Context(main))}
