"""A text folder becomes two disjoint byte strings in a cache that survives damage and rivals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from obsinfra.errors import DataError
from obsinfra.workloads.text_corpus import SEPARATOR, Corpus, open_corpus

STDLIB = Path(sysconfig.get_path("stdlib"))
NEEDED = 129


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Real modules: the standard library's json, email and importlib, as a folder of folders."""
    folder = tmp_path / "sources"
    for package in ("json", "email", "importlib"):
        (folder / package).mkdir(parents=True)
        for path in sorted((STDLIB / package).glob("*.py")):
            (folder / package / path.name).write_bytes(path.read_bytes())
    return folder


def content(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.numpy().tobytes())


def parts(corpus: Corpus) -> tuple[set[bytes], set[bytes]]:
    """The files to train on and those held out."""
    train, held = (content(tensor).split(SEPARATOR) for tensor in (corpus.training(), corpus.held_out()))
    assert train.pop() == held.pop() == b""
    return set(train), set(held)


def test_every_file_is_in_exactly_one_part(sources: Path) -> None:
    files = {path.read_bytes() for path in sources.rglob("*.py")}
    corpus = open_corpus(str(sources), needed=NEEDED)
    training, held_out = parts(corpus)
    assert training | held_out == files and not training & held_out
    assert (corpus.training_files, corpus.held_out_files) == (len(training), len(held_out))
    assert len(held_out) < len(files) / 4
    assert corpus.training().dtype == torch.uint8


def test_the_standard_library_without_installed_packages_is_the_default() -> None:
    """Held out is about every 20th file, and none of it is trained on."""
    corpus = open_corpus(None, needed=NEEDED)
    training, held_out = parts(corpus)
    # Python's own test data may hold the same bytes twice, such as empty packages with a comment.
    assert sum(map(len, training & held_out)) < 0.001 * corpus.held_out_bytes
    assert 0.02 < corpus.held_out_files / (corpus.training_files + corpus.held_out_files) < 0.1
    assert (STDLIB / "textwrap.py").read_bytes() in training | held_out
    packages = Path(torch.__file__).with_name("functional.py").read_bytes()
    assert packages not in training | held_out


def test_new_files_do_not_move_the_old_ones(tmp_path: Path) -> None:
    """Where a file goes is decided by its path, so a grown folder never trains on what was held out."""
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(200):
        (folder / f"{number}.txt").write_text(f"note {number} " * 40)
    before = parts(open_corpus(str(folder), needed=NEEDED))
    for number in range(200, 260):
        (folder / f"{number}.txt").write_text(f"note {number} " * 40)
    after = parts(open_corpus(str(folder), needed=NEEDED))
    assert before[0] <= after[0] and before[1] <= after[1] and len(before[1]) > 2


@pytest.mark.parametrize("count", range(2, 12))
def test_a_folder_of_few_files_holds_one_of_them_out(tmp_path: Path, count: int) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    for path in sorted((STDLIB / "email").glob("*.py"))[:count]:
        (folder / path.name).write_bytes(path.read_bytes() * 2)
    (folder / "image.png").write_bytes(b"\x89PNG\0\0" * 100)
    training, held_out = parts(open_corpus(str(folder), needed=NEEDED))
    assert len(held_out) >= 1 and len(training) + len(held_out) == count


@pytest.mark.parametrize("inside", [False, True], ids=["a file", "a folder with one file"])
def test_of_a_single_file_the_last_tenth_is_held_out(tmp_path: Path, inside: bool) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    text = (STDLIB / "argparse.py").read_bytes()
    (folder / "argparse.py").write_bytes(text)
    corpus = open_corpus(str(folder if inside else folder / "argparse.py"), needed=NEEDED)
    training, held_out = content(corpus.training()), content(corpus.held_out())
    assert training + held_out == text and len(training) == len(text) * 9 // 10


def test_binary_hidden_compiled_and_linked_files_are_left_out(sources: Path) -> None:
    before = open_corpus(str(sources), needed=NEEDED)
    (sources / "picture.bin").write_bytes(b"GIF89a\0\0" + b"x" * 500)
    (sources / "empty.txt").touch()
    (sources / ".secret").write_text("hidden" * 100)
    (sources / ".git").mkdir()
    (sources / ".git" / "config").write_text("hidden" * 100)
    (sources / "__pycache__").mkdir()
    (sources / "__pycache__" / "text").write_text("cached" * 100)
    (sources / "link.py").symlink_to(STDLIB / "argparse.py")
    (sources / "loop").symlink_to(sources)
    after = open_corpus(str(sources), needed=NEEDED)
    assert (after.digest, after.training_files) == (before.digest, before.training_files)


def test_text_in_any_encoding_and_names_that_are_no_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = {"Grüße, 世界 ".encode() * 50, "Grüße ".encode("latin-1") * 50}
    (folder / "utf8.txt").write_bytes("Grüße, 世界 ".encode() * 50)
    (folder / os.fsdecode(b"na\xefve.txt")).write_bytes("Grüße ".encode("latin-1") * 50)
    training, held_out = parts(open_corpus(str(folder), needed=NEEDED))
    assert training | held_out == texts


def test_a_second_start_reads_nothing_but_the_cache(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_corpus(str(sources), needed=NEEDED)

    def refuse(path: Path) -> bytes:
        raise AssertionError(f"read {path} again")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert open_corpus(str(sources), needed=NEEDED) == first


def test_a_changed_file_makes_another_corpus(sources: Path) -> None:
    first = open_corpus(str(sources), needed=NEEDED)
    changed = sources / "json" / "decoder.py"
    changed.write_bytes(changed.read_bytes().replace(b"JSON", b"json"))
    second = open_corpus(str(sources), needed=NEEDED)
    assert first.digest != second.digest and first.folder != second.folder
    assert changed.read_bytes() in set.union(*parts(second))


def cut_short(folder: Path) -> None:
    os.truncate(folder / "train.bin", 1000)


def without_held_out(folder: Path) -> None:
    (folder / "held_out.bin").unlink()


def without_description(folder: Path) -> None:
    (folder / "corpus.json").unlink()


def torn_description(folder: Path) -> None:
    (folder / "corpus.json").write_text('{"source": "x", ')


def other_description(folder: Path) -> None:
    (folder / "corpus.json").write_text("[1, 2]")


def binary_description(folder: Path) -> None:
    (folder / "corpus.json").write_bytes(b"\xff\xfe\0")


def foreign_description(folder: Path) -> None:
    found = json.loads((folder / "corpus.json").read_text())
    (folder / "corpus.json").write_text(json.dumps(found | {"folder": "/somewhere/else"}))


def only_an_empty_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        cut_short, without_held_out, without_description, torn_description, other_description,
        binary_description, foreign_description, only_an_empty_folder,
    ],
)  # fmt: skip
def test_a_damaged_cache_is_built_anew(sources: Path, damage: Callable[[Path], None]) -> None:
    first = open_corpus(str(sources), needed=NEEDED)
    expected = parts(first)
    damage(Path(first.folder))
    second = open_corpus(str(sources), needed=NEEDED)
    assert second == first and parts(second) == expected


def test_nothing_half_made_is_left_behind(sources: Path, cache: Path) -> None:
    corpus = open_corpus(str(sources), needed=NEEDED)
    folder = Path(corpus.folder)
    assert [path.name for path in cache.rglob("*.tmp")] == []
    assert {path.name for path in folder.iterdir()} == {"train.bin", "held_out.bin", "corpus.json"}


@pytest.mark.slow
def test_processes_that_start_together_share_one_corpus(sources: Path) -> None:
    """As the ranks of a run do; none takes the folder away from another. Repeated, since it is a race."""
    code = (
        "import sys; from obsinfra.workloads.text_corpus import open_corpus\n"
        "print('ready', flush=True)\n"
        "for folder in sys.stdin:\n"
        "    corpus = open_corpus(folder.strip(), needed=129)\n"
        "    print(corpus.digest, int(corpus.training().sum()), int(corpus.held_out().sum()), flush=True)"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    try:
        for rank in ranks:
            assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
        for attempt in range(25):
            (sources / "json" / "attempt.py").write_text(f"attempt = {attempt}\n" * 20)
            for rank in ranks:
                assert rank.stdin is not None
                rank.stdin.write(f"{sources}\n")
                rank.stdin.flush()
            assert len({rank.stdout.readline() for rank in ranks if rank.stdout} - {""}) == 1
    finally:
        for rank in ranks:
            rank.communicate(timeout=30)
    assert [rank.returncode for rank in ranks] == [0] * 4


def test_a_path_that_leads_nowhere(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no text at .*absent") as caught:
        open_corpus(str(tmp_path / "absent"), needed=NEEDED)
    assert "--data-path" in caught.value.fix


def test_a_folder_without_files(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="holds no files"):
        open_corpus(str(tmp_path / "bare"), needed=NEEDED)


@pytest.mark.parametrize("text", [b"", b"too short", b"\0" * 10_000])
def test_too_little_text_says_how_much_there_is(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "little.txt").write_bytes(text)
    with pytest.raises(DataError, match="bytes of text to train on; expected at least 129") as caught:
        open_corpus(str(tmp_path / "little.txt"), needed=NEEDED)
    assert "more or longer files" in caught.value.fix


def test_a_cache_that_cannot_be_written_names_the_variable(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    with pytest.raises(DataError, match="cannot join the text") as caught:
        open_corpus(str(sources), needed=NEEDED)
    assert "XDG_CACHE_HOME" in caught.value.fix
