"""A journal is believed where it is right, and refused where it lies."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import streammap
from streammap.errors import OutputError
from streammap.io.storage import disk
from streammap.io.storage.disk import LocalDisk
from streammap.output import bound_json, journal, transaction
from streammap.output.fingerprint import Fingerprint
from streammap.output.journal import Journal
from streammap.testing import faults
from tests.support import tiny

REQUEST = Fingerprint({"steps": [{"operator": "coalesce", "width": 2}], "files": {"a": 4}}, "00")
KEYS = frozenset({"a", "b", "ä"})
HEAD = journal.first_line(REQUEST)


def line(key: str, crc: str) -> bytes:
    """A journal's line."""
    return bound_json.encode({"tensors": {key: crc}})


GOOD = line("a", "00000001")


def read(tmp_path: Path, content: bytes, name: str = journal.NAME) -> dict[str, int]:
    (tmp_path / name).write_bytes(content)
    return journal.read(tmp_path, REQUEST, KEYS)


@given(st.dictionaries(st.sampled_from(sorted(KEYS)), st.integers(0, 2**32 - 1)))
def test_what_was_added_is_read(crcs: dict[str, int]) -> None:
    folder = Path(os.environ.get("PYTEST_TMP", "/tmp")) / f"journal-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    try:
        for key, crc in crcs.items():
            written = Journal(folder / journal.NAME, REQUEST, disk=LocalDisk(), fsync=False)
            written.add({key: crc})
            written.close()
        assert journal.read(folder, REQUEST, KEYS) == crcs
    finally:
        shutil.rmtree(folder)


def test_several_journals_are_read_together(tmp_path: Path) -> None:
    (tmp_path / "journal-1.jsonl").write_bytes(HEAD + b'{"tensors":{"b":"00000002"}}\n')
    assert read(tmp_path, HEAD + GOOD) == {"a": 1, "b": 2}


@pytest.mark.parametrize("n", range(0, len(HEAD + GOOD), 7))
def test_a_torn_end_does_not_count(tmp_path: Path, n: int) -> None:
    assert read(tmp_path, (HEAD + GOOD)[:n]) == {}
    assert read(tmp_path, HEAD + GOOD + line("b", "00000001")[: n % len(GOOD)]) == {"a": 1}
    assert read(tmp_path, HEAD + GOOD + b"\0\0\0\n") == {"a": 1}


def test_a_torn_end_is_written_over(tmp_path: Path) -> None:
    for torn in (GOOD[:-5], b"\0\0\n", b"\0" * 5000):
        (tmp_path / journal.NAME).write_bytes(HEAD + GOOD + torn)
        written = Journal(tmp_path / journal.NAME, REQUEST, disk=LocalDisk(), fsync=True)
        written.add({"b": 2})
        written.close()
        assert (tmp_path / journal.NAME).read_bytes() == HEAD + GOOD + line("b", "00000002")


def test_a_line_that_could_not_be_written_is_written_over(tmp_path: Path) -> None:
    full = faults.FullDisk(len(HEAD) + len(GOOD) + 9)
    written = Journal(tmp_path / journal.NAME, REQUEST, disk=full, fsync=False)
    written.add({"a": 1})
    with pytest.raises(OSError, match="No space left"):
        written.add({"b": 2})
    full.free_nbytes = 1000
    written.add({"b": 2})
    written.close()
    assert journal.read(tmp_path, REQUEST, KEYS) == {"a": 1, "b": 2}


WRONG: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{nonsense\n" + GOOD, "its first line is not that of a journal"),
    "no object": (b"[1, 2]\n", "its first line is not that of a journal"),
    "another file": (b'{"model_type": "bert"}\n', "its first line is not that of a journal"),
    "a later format": (
        bound_json.encode(REQUEST.head(streammap_journal=2)),
        "format 2, expected 1",
    ),
    "another CRC": (HEAD + GOOD.replace(b"1", b"2", 1) + GOOD, "line 2 is not that of a journal"),
    "a line within": (HEAD + b"{torn\n" + GOOD, "line 2 is not that of a journal"),
    "another table": (HEAD + b'{"shards":{}}\n' + GOOD, "line 2 is not that of a journal"),
    "no table": (HEAD + b'{"tensors":["a"]}\n', "line 2 is not that of a journal"),
    "more than a table": (HEAD + b'{"tensors":{},"x":1}\n', "line 2 is not that of a journal"),
    "an unknown key": (
        HEAD + b'{"tensors":{"../x":"00000001"}}\n',
        "'../x' with '00000001' is not",
    ),
    "a number": (HEAD + b'{"tensors":{"a":1}}\n', "'a' with '1' is not a tensor of this"),
    "too short": (HEAD + b'{"tensors":{"a":"1"}}\n', "'a' with '1' is not a tensor of this"),
    "no hex": (HEAD + b'{"tensors":{"a":"0000000G"}}\n', "'a' with '0000000G' is not a tensor"),
    "two minds": (HEAD + GOOD + line("a", "00000002"), "'a' with '00000002' is not a tensor"),
    "huge": (HEAD + GOOD * 50_000, "bytes, at most"),
    "deep": (HEAD + b'{"tensors":' * 50_000 + b"\n" + GOOD, "line 2 is not that of a journal"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_journal_that_lies_is_refused(tmp_path: Path, what: str) -> None:
    content, told = WRONG[what]
    with pytest.raises(OutputError, match=rf"journal\.jsonl: a damaged .*{re.escape(told)}") as e:
        read(tmp_path, content)
    assert e.value.hint == "pass --restart to start over"
    (tmp_path / journal.NAME).rename(tmp_path / "journal-7.jsonl")
    with pytest.raises(OutputError, match=re.escape(told)):
        read(tmp_path, HEAD + GOOD)


def test_no_journal_is_read_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "else").write_bytes(HEAD + GOOD)
    (tmp_path / journal.NAME).symlink_to("else")
    with pytest.raises(OutputError, match="a damaged journal: Too many levels of symbolic links"):
        journal.read(tmp_path, REQUEST, KEYS)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": []}, r'steps 0 {"operator": "coalesce", "width": 2} is now nothing'),
        ({"steps": [{"operator": "coalesce", "width": 4}]}, "steps 0 width 2 is now 4"),
        ({"files": {"a": 4, "b": 1}}, "files b nothing is now 1"),
        ({"maps": ["x" * 200]}, r'maps nothing is now \["xxxx.*\.\.\.'),
    ],
)
def test_what_differs_is_told(tmp_path: Path, change: dict[str, object], told: str) -> None:
    (tmp_path / journal.NAME).write_bytes(HEAD + GOOD)
    other = Fingerprint({**REQUEST.content, **change}, "00")
    with pytest.raises(OutputError, match=f"another request: {told}") as caught:
        journal.read(tmp_path, other, KEYS)
    assert caught.value.hint == "run the earlier command again, or pass --restart to start over"


def test_formulas_that_differ_are_told(tmp_path: Path) -> None:
    (tmp_path / journal.NAME).write_bytes(HEAD + GOOD)
    with pytest.raises(OutputError, match="the formulas of its tensors differ"):
        journal.read(tmp_path, Fingerprint(REQUEST.content, "01"), KEYS)


@given(st.binary(max_size=60), st.integers(0, len(HEAD + GOOD)))
def test_whatever_stands_in_it_only_our_error_comes_out(content: bytes, at: int) -> None:
    folder = Path("/tmp") / f"journal-fuzz-{os.getpid()}"
    folder.mkdir(exist_ok=True)
    try:
        found = read(folder, (HEAD + GOOD)[:at] + content + GOOD)
    except OutputError:
        return
    finally:
        shutil.rmtree(folder)
    assert set(found) <= KEYS


# Shards that are not what a journal says.


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source, and an output that a run left unfinished."""
    folder = tmp_path_factory.mktemp("stopped")
    sizes = tiny.Sizes()
    source = tiny.write(folder / "big", tiny.bert(sizes), tiny.bert_config(sizes))
    wrong = faults.fail_at(20, kinds=frozenset(("write",)))
    with disk.using(wrong), pytest.raises(OutputError):
        streammap.open(source).save(folder / "out", max_shard_size=600, threads=1)
    return source, folder / "out"


def first_shard(out: Path) -> Path:
    return min((out / ".streammap-run" / "files").iterdir())


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


LIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "No such file"),
    "short": (lambda file: os.truncate(file, 20), r"20 bytes, by its journal \d+ at least"),
    "long": (lambda file: os.truncate(file, 10**5), r"100000 bytes, by .* and \d+ at most"),
    "another": (lambda file: file.write_bytes(b"x" * file.stat().st_size), "another header"),
    "a link": (lambda file: file.symlink_to(file.rename(file.with_name("x"))), "symbolic links"),
    "a folder": (folder_instead, "Is a directory|bytes, by its"),
}


@pytest.mark.parametrize("what", LIES)
def test_shards_that_are_not_what_the_journal_says_are_refused(
    stopped: tuple[Path, Path], tmp_path: Path, what: str
) -> None:
    source, left = stopped
    out, (lie, told) = shutil.copytree(left, tmp_path / "out"), LIES[what]
    lie(first_shard(out))
    lazy = streammap.open(source)
    with pytest.raises(OutputError, match=told) as caught:
        lazy.save(out, max_shard_size=600)
    assert caught.value.hint == "pass --restart to start over"
    assert (out / ".streammap-run" / "journal.jsonl").exists()
    lazy.save(out, max_shard_size=600, restart=True)
    tiny.assert_same(tiny.written(out), tiny.written(source))


@pytest.mark.parametrize("name", [".streammap-run", ".streammap-run/files", ".streammap-run/lock"])
def test_no_link_is_followed_out_of_a_work_folder(
    stopped: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    source, left = stopped
    out, other = shutil.copytree(left, tmp_path / "out"), tmp_path / "other"
    (out / name).rename(other)
    (out / name).symlink_to(other)
    before = tiny.tree(other) if other.is_dir() else {}
    with pytest.raises(OutputError, match=r"not a folder|symbolic links"):
        streammap.open(source).save(out, max_shard_size=600)
    assert (tiny.tree(other) if other.is_dir() else {}) == before


# The mark of a result that is being put in place.


def marked(stopped: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the unfinished output, whose run was killed in the middle of its renames."""
    source, left = stopped
    out = shutil.copytree(left, tmp_path / "out")
    n = iter(range(10**6))

    def before(kind: str, _: int, path: Path) -> None:
        if kind == "rename" and path.parent == out and next(n) == 3:
            raise KeyboardInterrupt

    with disk.using(faults.CountingDisk(before)), pytest.raises(KeyboardInterrupt) as caught:
        streammap.open(source).save(out, max_shard_size=600)
    assert "the same command puts it in its place" in caught.value.__notes__[0]
    return out


def test_a_result_that_is_half_in_place_is_not_opened(
    stopped: tuple[Path, Path], tmp_path: Path
) -> None:
    out = marked(stopped, tmp_path)
    with pytest.raises(streammap.CheckpointError, match="stopped while it put its result here"):
        streammap.open(out)
    report = streammap.open(stopped[0]).save(out, max_shard_size=600)
    assert (report.nbytes_written, report.nbytes_read) == (0, 0)
    assert report.n_resumed == report.n_tensors
    tiny.assert_same(tiny.written(out), tiny.written(stopped[0]))
    assert not (out / ".streammap-run").exists()


def test_a_result_is_put_in_place_without_its_sources(
    stopped: tuple[Path, Path], tmp_path: Path
) -> None:
    assert not transaction.finish(tmp_path / "out")
    out = marked(stopped, tmp_path)
    assert transaction.finish(str(out))
    tiny.assert_same(tiny.written(out), tiny.written(stopped[0]))
    assert not (out / ".streammap-run").exists()
    assert not transaction.finish(out)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a/../../x", "", ".", "a//b", "x\0", 3, ".streammap-run/lock"]
)
def test_a_mark_names_files_of_the_result_only(
    stopped: tuple[Path, Path], tmp_path: Path, name: object
) -> None:
    out = marked(stopped, tmp_path)
    mark = out / ".streammap-run" / "commit.json"
    content = json.loads(mark.read_text())
    del content["crc32"]
    mark.write_bytes(bound_json.encode({**content, "files": [*content["files"], name]}))
    with pytest.raises(OutputError, match="names that can't be files of a result"):
        streammap.open(stopped[0]).save(out, max_shard_size=600)


def test_a_mark_of_another_request_is_refused(stopped: tuple[Path, Path], tmp_path: Path) -> None:
    out = marked(stopped, tmp_path)
    lazy = streammap.open(stopped[0])
    with pytest.raises(OutputError, match="max_shard_size 600 is now 700"):
        lazy.save(out, max_shard_size=700)
    shutil.copytree(out, tmp_path / "again")
    for place, overwrite in ((out, False), (tmp_path / "again", True)):
        lazy.save(place, max_shard_size=700, restart=True, overwrite=overwrite)
        tiny.assert_same(tiny.written(place), tiny.written(stopped[0]))
        assert streammap.verify(place).ok


@pytest.mark.parametrize("content", ["", "{", "[]", '{"streammap_commit": 9}'])
def test_a_damaged_mark_is_refused(
    stopped: tuple[Path, Path], tmp_path: Path, content: str
) -> None:
    out = marked(stopped, tmp_path)
    (out / ".streammap-run" / "commit.json").write_text(content)
    with pytest.raises(
        OutputError, match=r"commit\.json: not one that this version wrote"
    ) as error:
        streammap.open(stopped[0]).save(out, max_shard_size=600)
    assert error.value.hint == "pass --restart to start over"
    streammap.open(stopped[0]).save(out, max_shard_size=5000, restart=True)
    assert streammap.verify(out).ok


def test_a_file_that_a_mark_names_and_nobody_has_is_told(
    stopped: tuple[Path, Path], tmp_path: Path
) -> None:
    out = marked(stopped, tmp_path)
    name = first_shard(out).name
    first_shard(out).unlink()
    with pytest.raises(OutputError, match=rf"{name} is missing, here and in"):
        streammap.open(stopped[0]).save(out, max_shard_size=600)


def test_a_journal_that_could_not_begin_begins_again(tmp_path: Path) -> None:
    """Its first line was not written: what is said next comes after one, not in its place."""
    written = Journal(tmp_path / journal.NAME, REQUEST, disk=disk.current(), fsync=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk, "write_all", _refused)
        with pytest.raises(OSError, match="no room"):
            written.add({"a": 1})
    written.add({"a": 1})
    written.close()
    assert journal.read(tmp_path, REQUEST, KEYS) == {"a": 1}


def _refused(*_: object) -> None:
    raise OSError("no room")
