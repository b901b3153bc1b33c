"""Any text folder or file as two memory-mapped byte strings: to train on, and held out. Used by byte_gpt.

The files are joined once into the user's cache folder, under a name made from their listing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from obsinfra.errors import DataError

SEPARATOR = b"\0"
"""Between files. Text has no NUL, and a file with one near its start is taken for binary and left out."""
HELD_OUT_SHARE = 20
"""One file in this many is held out, chosen by the hash of its path; of fewer files at least one."""
_PROBE_BYTES = 8192
_LAYOUT = 2
"""Raise when the cached form changes."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """A corpus in the cache.

    Attributes:
        source: folder or file it was made from.
        digest: of the bytes to train on and held out; identifies the content.
        training_bytes, held_out_bytes, training_files, held_out_files: sizes.
        folder: where `train.bin` and `held_out.bin` lie.
    """

    source: str
    digest: str
    training_bytes: int
    held_out_bytes: int
    training_files: int
    held_out_files: int
    folder: str

    def training(self) -> Tensor:
        """The bytes to train on, uint8 [training_bytes], memory-mapped."""
        return _mapped(Path(self.folder, "train.bin"), self.training_bytes)

    def held_out(self) -> Tensor:
        """The held-out bytes, uint8 [held_out_bytes], memory-mapped."""
        return _mapped(Path(self.folder, "held_out.bin"), self.held_out_bytes)


def open_corpus(data_path: str | None, *, needed: int) -> Corpus:
    """The corpus at `data_path`, joined into the cache if it is not there yet.

    Args:
        data_path: a text file, of which the last tenth is held out, or a folder, of which about every 20th
            file is; None: the sources of Python's standard library, without installed packages.
        needed: fewest bytes that each of the two parts must have.

    Raises:
        DataError: nothing there, unreadable, not enough text, or the cache folder cannot be written.
    """
    root = Path(data_path).expanduser() if data_path else Path(sysconfig.get_path("stdlib"))
    if not root.exists():
        raise DataError(f"no text at {root}", "a text file or a folder of them", "check --data-path")
    files = _listing(root, only_python=data_path is None)
    if not files:
        raise DataError(f"folder {root} holds no files", "text files")
    folder = _cache_root() / _key(str(root.resolve())) / _key(json.dumps([_LAYOUT, HELD_OUT_SHARE, files]))
    corpus = _cached(folder)
    if corpus is None:
        try:
            with _only_builder(folder):
                # Another process, such as another rank of this run, may have built it meanwhile.
                corpus = _cached(folder) or _build(root, [Path(root, name) for name, _, _ in files], folder)
        except OSError as error:
            raise DataError(
                f"cannot join the text of {root} into {folder}: {error.strerror or error}",
                "readable files and a writable cache folder",
                "check the permissions, or set XDG_CACHE_HOME to another folder",
            ) from error
    for part, size in (("to train on", corpus.training_bytes), ("held out", corpus.held_out_bytes)):
        if size < needed:
            raise DataError(
                f"{root} has {size} bytes of text {part}", f"at least {needed}", "give more or longer files"
            )
    return corpus


def _listing(root: Path, *, only_python: bool) -> list[tuple[str, int, int]]:
    """Relative path, size and time of change of every file that may be text, in a fixed order.

    Hidden files and folders, `__pycache__` and, for the standard library, installed packages are left out;
    links are not followed.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot list {error.filename}: {error.strerror}", "a folder you may read") from error

    if root.is_file():
        found = root.stat()
        return [("", found.st_size, found.st_mtime_ns)]
    left_out = {"__pycache__", "site-packages", "dist-packages"} if only_python else {"__pycache__"}
    files = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = sorted(f for f in folders if f not in left_out and not f.startswith("."))
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or (only_python and path.suffix != ".py") or path.is_symlink():
                continue
            if path.is_file():
                found = path.stat()
                files.append((path.relative_to(root).as_posix(), found.st_size, found.st_mtime_ns))
    return sorted(files)


@contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """Alone among all processes that would build `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(root: Path, paths: list[Path], folder: Path) -> Corpus:
    """Join the files into `folder`, which appears whole or not at all."""
    building = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    building.mkdir(mode=0o700)
    digest = hashlib.blake2b(digest_size=16)
    sizes, counts = {"train.bin": 0, "held_out.bin": 0}, {"train.bin": 0, "held_out.bin": 0}
    try:
        with (building / "train.bin").open("wb") as train, (building / "held_out.bin").open("wb") as held:
            into = {"train.bin": train, "held_out.bin": held}

            def add(part: str, text: bytes) -> None:
                into[part].write(text)
                digest.update(part.encode() + len(text).to_bytes(8, "big"))
                digest.update(text)
                sizes[part] += len(text)
                counts[part] += 1

            texts = [path for path in paths if _is_text(path)]
            held_out = _held_out(root, texts)
            for path in texts:
                text = path.read_bytes()
                if len(texts) == 1:
                    boundary = len(text) * 9 // 10
                    add("train.bin", text[:boundary])
                    add("held_out.bin", text[boundary:])
                else:
                    add("held_out.bin" if path in held_out else "train.bin", text + SEPARATOR)
        corpus = Corpus(
            source=str(root),
            digest=digest.hexdigest(),
            training_bytes=sizes["train.bin"],
            held_out_bytes=sizes["held_out.bin"],
            training_files=counts["train.bin"],
            held_out_files=counts["held_out.bin"],
            folder=str(folder),
        )
        (building / "corpus.json").write_text(json.dumps(asdict(corpus), indent=2))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one would be in the way
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return corpus


def _cached(folder: Path) -> Corpus | None:
    """The corpus in `folder` if it is there in full; a damaged one counts as absent and is built anew."""
    try:
        corpus = Corpus(**json.loads((folder / "corpus.json").read_text()))
        sound = (
            (folder / "train.bin").stat().st_size == corpus.training_bytes
            and (folder / "held_out.bin").stat().st_size == corpus.held_out_bytes
            and corpus.folder == str(folder)
        )
    except (OSError, ValueError, TypeError):
        return None
    return corpus if sound else None


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(_PROBE_BYTES)
    return bool(start) and b"\0" not in start


def _held_out(root: Path, texts: list[Path]) -> set[Path]:
    numbers = {path: int(_key(path.relative_to(root).as_posix()), 16) for path in texts}
    chosen = {path for path, number in numbers.items() if number % HELD_OUT_SHARE == 0}
    return chosen or set(sorted(numbers, key=numbers.__getitem__)[:1])


def _key(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()


def _cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "obsinfra", "corpora")


def _mapped(path: Path, size: int) -> Tensor:
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
