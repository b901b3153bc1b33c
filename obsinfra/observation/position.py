"""Where in the data a loop is, and how to get there again: for any iterable, exactly where it can be exact.

Loaders with `state_dict`/`load_state_dict` tell their own position. Others are fast-forwarded: the random
state of the epoch's start is put back, the batches already used are drawn and dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from obsinfra.backup.rng import capture_rng_state, restore_rng_state
from obsinfra.errors import CheckpointError


class DataPosition:
    """Epoch and batch counters of one loop, with what is needed to return to them.

    Attributes:
        epoch: epoch under way, or the next one between two epochs.
        passes: passes over data within this epoch that came to their end before the present one, where an
            epoch has several (`begin_pass`).
        batches_done: batches of this pass whose step has finished.
        exhausted: the pass's data is used up; what may be left of the epoch is its validation.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.passes = 0
        self.batches_done = 0
        self.exhausted = False
        self._passed_over = 0
        self._epoch_rng: Mapping[str, Any] | None = None
        self._generator_state: torch.Tensor | None = None
        self._loader: Any = None
        self._resume: Mapping[str, Any] | None = None
        self._skip = 0

    def state_dict(self) -> dict[str, Any]:
        """Position at a step boundary; called on the loop's thread."""
        loader_state = None
        if self._loader is not None and _tells_position(self._loader):
            loader_state = self._loader.state_dict()
        elif self._resume is not None:
            loader_state = self._resume.get("loader")
        generator = getattr(self._loader, "generator", None)
        generator_now = generator.get_state() if isinstance(generator, torch.Generator) else None
        if self._loader is None and self._resume is not None:  # between a restore and the next `iterate`
            generator_now = self._resume["generator_now"]
        return {
            "generator_now": generator_now,
            "epoch": self.epoch,
            "passes": self.passes,
            "batches_done": self.batches_done,
            "exhausted": self.exhausted,
            "epoch_rng": self._epoch_rng,
            "generator": self._generator_state,
            "loader": loader_state,
            "skip": self._skip,
        }

    def load_state_dict(self, state: Mapping[str, Any], rng: Mapping[str, Any]) -> None:
        """Continue from `state` at the next `iterate`; `rng` is the random state to have there."""
        self.epoch = int(state["epoch"])
        self.passes = int(state.get("passes", 0))
        self._passed_over = 0
        self.batches_done = int(state["batches_done"])
        self.exhausted = bool(state["exhausted"])
        self._epoch_rng = state["epoch_rng"]
        self._generator_state = state["generator"]
        self._skip = int(state.get("skip", 0))
        self._loader = None  # what a loader in use says of its position is of before
        self._resume = {**state, "rng": rng}

    def skip(self, batches: int) -> None:
        """Pass over so many batches at the next `iterate`, or as many as are left of the epoch."""
        self._skip += batches

    def begin_epoch(self, epoch: int) -> None:
        """A new epoch; the random state of its start is remembered."""
        if self._resume is not None and self._passed_over:  # the pass to go on in did not come again
            restore_rng_state(self._resume["rng"])
            self._resume = None
        self.epoch = epoch
        self.passes = self._passed_over = 0
        self._begin()

    def begin_pass(self) -> bool:
        """The loop goes to data, for the first time in this epoch or once more.

        Returns:
            False for a pass that a resumed run had completed: it is to be passed over.
        """
        if self._resume is not None and self._passed_over < self.passes:
            self._passed_over += 1
            return False
        if self._resume is None and self._epoch_rng is not None:  # one has begun
            self.passes += 1
            self._begin()
        return True

    def _begin(self) -> None:
        self.batches_done = 0
        self.exhausted = False
        self._epoch_rng = None
        self._generator_state = None

    def iterate(self, loader: Iterable[Any]) -> Iterator[Any]:
        """An iterator over what is left of this epoch.

        Raises:
            CheckpointError: the loader has fewer batches than were already used.
        """
        iterator = self._iterator(loader)
        if self._skip:
            rng = capture_rng_state()
            while self._skip and next(iterator, _END) is not _END:
                self._skip -= 1
                self.batches_done += 1
            self._skip = 0
            restore_rng_state(rng)
        return iterator

    def _iterator(self, loader: Iterable[Any]) -> Iterator[Any]:
        self._loader = loader
        resume, self._resume = self._resume, None
        own_state = _tells_position(loader)
        generator = getattr(loader, "generator", None)
        if resume is not None:
            restore_rng_state(resume["rng"])
            if own_state and resume["loader"] is not None:
                loader.load_state_dict(resume["loader"])  # type: ignore[attr-defined]
            if resume["exhausted"]:
                if isinstance(generator, torch.Generator) and resume["generator_now"] is not None:
                    generator.set_state(resume["generator_now"])
                return iter(())
            if own_state and resume["loader"] is not None:
                return iter(loader)
        begun = resume is not None and resume["epoch_rng"] is not None
        if resume is None or own_state or not begun:
            if resume is not None and resume["generator_now"] is not None and generator is not None:
                generator.set_state(resume["generator_now"])
            self._epoch_rng = capture_rng_state()
            self._generator_state = generator.get_state() if isinstance(generator, torch.Generator) else None
            return iter(loader)
        # No own state and the epoch had begun: replay its start and drop the batches that were used.
        restore_rng_state(resume["epoch_rng"])
        if isinstance(generator, torch.Generator) and resume["generator"] is not None:
            generator.set_state(resume["generator"])
        iterator = iter(loader)
        for done in range(resume["batches_done"]):
            if next(iterator, _END) is _END:
                raise CheckpointError(
                    f"the data ended after {done} batches; {resume['batches_done']} of this epoch were used",
                    "the same data and batch size as before the checkpoint",
                    "start a new run for other data",
                )
        restore_rng_state(resume["rng"])
        return iterator


def _tells_position(loader: Any) -> bool:
    """Whether a loader has a state of its own. Accelerate's wrapper always seems to: what it wraps tells."""
    inner = getattr(loader, "base_dataloader", loader)
    return all(hasattr(one, name) for one in (loader, inner) for name in ("state_dict", "load_state_dict"))


_END = object()
