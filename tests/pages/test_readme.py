"""What the pages say can be typed."""

import re
import shlex
from pathlib import Path

import pytest

from streammap.architectures import registry
from tests.support import tiny, typed

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "schemes/README.md",
    "streammap/architectures/README.md",
    "docs/original.md",
    "docs/resume.md",
    "docs/verify.md",
    "docs/security.md",
    "docs/launchers.md",
    "docs/hub.md",
    "docs/object-stores.md",
)
SIZES = tiny.Sizes(heads=4, layers=4)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def commands() -> list[str]:
    """Each `$ streammap ...` of the pages, continuation lines joined, comments left out."""
    found = []
    for page in PAGES:
        for block in blocks(page, "console"):
            joined = block.replace("\\\n", " ")
            found += [line[2:] for line in joined.splitlines() if line.startswith("$ streammap")]
    return found


@pytest.mark.parametrize("command", commands())
def test_each_command_is_one(command: str) -> None:
    _, *words = shlex.split(command, comments=True)
    found, rest = typed.command(*words)
    found.make_context(str(found.name), rest)


def test_the_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("all-MiniLM-L6-v2", "big"):
        tiny.write(tmp_path / name, tiny.bert(SIZES), tiny.bert_config(SIZES))
    for page in ("README.md", "docs/original.md"):
        for block in blocks(page, "python"):
            exec(compile(block, page, "exec"), {})
    assert (tmp_path / "blended" / "config.json").exists()
    assert (tmp_path / "out" / "config.json").exists()


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180
    for page in (*PAGES, "bench/README.md"):
        folder = (ROOT / page).parent
        for link in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text()):
            assert (folder / link).exists(), f"{page}: {link}"


def test_all_shipped_schemes_are_on_their_page() -> None:
    page = (ROOT / "schemes" / "README.md").read_text()
    for path in (ROOT / "schemes").glob("*.json"):
        assert f"`{path.name}`" in page


def test_the_readme_claims_no_more_model_types_than_there_are() -> None:
    claim = re.search(r"over (\d+) model types", (ROOT / "README.md").read_text(), re.IGNORECASE)
    assert claim is not None
    assert len(registry.model_types()) > int(claim[1])
