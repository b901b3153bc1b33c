"""A copy of a store at any fsspec URL (`s3://`, `file://`, `memory://`): what is there, and its files.

A copy is laid out as the store is. It lies at the URL itself, as `push` leaves it, or below it under a run's
name, as the trainer's mirror does. What is copied, and when, is not known here, nor tensors and torch.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fsspec.core import url_to_fs

from obsinfra.backup.compression import SUFFIX
from obsinfra.backup.objects import content_of, digest_of
from obsinfra.errors import CheckpointError, ObsinfraError

MANIFEST_NAME = re.compile(r"\d{12,}-[a-z]+-[0-9a-f]+\.json")
"""A manifest's file."""

DIGEST = re.compile(r"[0-9a-f]{64}")
"""What a chunk is called by: its sha256."""


class RemoteError(CheckpointError):
    """The remote cannot be reached, refuses, or lacks something."""


class Remote:
    """A copy of a store at `url`.

    Args:
        url: any that fsspec knows.
        options: for its file system, e.g. `{"endpoint_url": …}` for S3.

    Raises:
        RemoteError: no such protocol, or its package is missing.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self.url = url.rstrip("/")
        given = dict(options or {})
        protocol = url.partition("://")[0]
        if protocol in ("file", "local"):
            given.setdefault("auto_mkdir", True)
        elif protocol == "s3":  # botocore's own limits let a dead server hang a transfer for many minutes
            limits = {"connect_timeout": 10, "read_timeout": 60, "retries": {"max_attempts": 2}}
            given["config_kwargs"] = {**limits, **given.get("config_kwargs", {})}
        try:
            self._files, root = url_to_fs(self.url, **given)
        except ImportError as error:
            raise package_missing(protocol, error) from error
        except ValueError as error:
            raise RemoteError(
                f"URL {url!r}: {error}", "one that fsspec knows, e.g. s3://bucket/prefix"
            ) from error
        self._root = str(root).rstrip("/")

    def below(self, name: str) -> Remote:
        """The remote `<url>/<name>`."""
        found = copy.copy(self)
        found.url, found._root = f"{self.url}/{name}", f"{self._root}/{name}"
        return found

    def of_one_run(self, run: str | None = None) -> Remote:
        """Where the checkpoints are: here, or in a folder below that is a run's.

        Args:
            run: the folder to take if there are several.

        Raises:
            RemoteError: there are several, and none of that name.
        """
        if self.manifests():
            return self
        with self._reaching():
            try:
                found = self._files.ls(self._root, detail=True)
            except FileNotFoundError:
                return self
        paths = [str(info["name"]).rstrip("/") for info in found if info["type"] == "directory"]
        runs = sorted({path.rpartition("/")[2] for path in paths} - {"objects", "manifests"})
        if run in runs:
            return self.below(str(run))
        if len(runs) > 1:
            more = f" and {len(runs) - 5} more" if len(runs) > 5 else ""
            raise RemoteError(
                f"{self.url} holds several runs: {', '.join(runs[:5])}{more}",
                "the URL of one",
                f"name one, e.g. {self.url}/{runs[-1]}",
            )
        return self.below(runs[0]) if runs else self

    def manifests(self) -> dict[str, int]:
        """File names of the manifests there, and their sizes; oldest step first."""
        found = self._list("manifests")
        return {name: found[name] for name in sorted(found) if MANIFEST_NAME.fullmatch(name)}

    def objects(self) -> dict[str, int]:
        """File names of the chunks there, and their sizes; what they contain is not looked at."""
        found = self._list("objects")
        return {name: size for name, size in found.items() if DIGEST.fullmatch(digest_of(name))}

    def read_manifest(self, name: str) -> bytes:
        """The text of a manifest's file; not checked."""
        with self._reaching():
            return bytes(self._files.cat_file(f"{self._root}/manifests/{name}"))

    def read_objects(self, digests: Sequence[str]) -> dict[str, bytes]:
        """Chunks by the names of their files, compressed where they are, each one's content verified.

        Raises:
            CheckpointError: a chunk there is damaged.
            RemoteError: one is not there.
        """
        files: dict[str, bytes] = {}
        with self._reaching():
            missing = list(digests)
            for suffix in ("", SUFFIX):
                places = {self._place(digest + suffix): digest + suffix for digest in missing}
                found = self._files.cat(list(places), on_error="return") if places else {}
                for place, name in places.items():
                    if not isinstance(found[place], Exception):
                        files[name] = bytes(found[place])
                        missing.remove(digest_of(name))
                    elif suffix or not isinstance(found[place], FileNotFoundError):
                        raise found[place]
        for name, data in files.items():
            try:
                content_of(name, data)
            except ValueError as error:
                raise CheckpointError(
                    f"chunk {name[:12]} at {self.url} is damaged", "its own content"
                ) from error
        return files

    def write_objects(self, files: Mapping[str, bytes]) -> None:
        """Upload chunks by the names of their files."""
        with self._reaching():
            self._files.pipe({self._place(name): data for name, data in files.items()})

    def write_manifest(self, name: str, raw: bytes) -> None:
        """Upload a manifest, after all its chunks."""
        with self._reaching():
            self._files.pipe_file(f"{self._root}/manifests/{name}", raw)

    def _place(self, name: str) -> str:
        return f"{self._root}/objects/{name[:2]}/{name}"

    def _list(self, folder: str) -> dict[str, int]:
        with self._reaching():
            self._files.invalidate_cache()
            try:
                found = self._files.find(f"{self._root}/{folder}", detail=True)
            except FileNotFoundError:
                return {}
        return {str(path).rpartition("/")[2]: int(info["size"]) for path, info in found.items()}

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """Whatever a file system raises becomes a `RemoteError`: each has exceptions of its own."""
        try:
            yield
        except ObsinfraError:
            raise
        except Exception as error:
            raise RemoteError(
                f"{self.url}: {type(error).__name__}: {error}", "a remote that answers", "try again later"
            ) from error


def package_missing(protocol: str, error: ImportError) -> RemoteError:
    """What to say where the package of an fsspec protocol is not installed."""
    fix = "pip install 'obsinfra[s3]'" if protocol in ("s3", "s3a") else f"install what fsspec needs: {error}"
    return RemoteError(f"{protocol}:// cannot be used here", "its package installed", fix)
