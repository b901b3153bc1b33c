"""Tensors that become more with every look: their size, how fast they grow, who holds them, what made them.

`MemoryOptimizer` looks every so many steps, between two of them. A look goes through all objects of the
process, so it takes tenths of a second.
"""

from __future__ import annotations

import gc
import itertools
import tracemalloc
import types
import warnings
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from obsinfra.catalog import metrics as catalog
from obsinfra.monitoring.instruments import Instruments
from obsinfra.monitoring.logging_config import get_logger
from obsinfra.optimization.arguments import number, whole_number
from obsinfra.optimization.gc_schedule import all_objects

LOOKS = 4
"""Looks a group must have grown over, at each one: a cache that fills up does so too, but not for long."""

HOLDERS = 3
"""Ways listed to a leaking tensor."""

TOLD = 5
"""Kinds of tensors told of per look, each once."""

_SEARCHED = 64
"""Containers followed from a tensor outwards until one has a name."""

_NOT_HOLDERS = (types.FrameType, types.ModuleType, types.GeneratorType, type, torch.Tensor)

Group = tuple[str, str, tuple[int, ...]]
"""Device, dtype and shape: what the tensors of a leak usually have in common."""


@dataclass(frozen=True, slots=True)
class Growing:
    """A kind of tensor there are more of at each look.

    Attributes:
        device, dtype, shape: what they have in common.
        count: how many there are.
        grown: how many more than at the first of the looks.
        bytes: of all of them.
        bytes_per_step: growth.
        held_by: ways to some of the newest, from the outside in, e.g. `Trainer.history → list[812]`.
        made_by: the autograd nodes that made them, with how many each; kept graphs are the usual leak.
        made_at: source lines that made them, where `tracemalloc` traces.
    """

    device: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    grown: int
    bytes: int
    bytes_per_step: float
    held_by: tuple[str, ...]
    made_by: tuple[tuple[str, int], ...]
    made_at: tuple[str, ...]


class LeakDetector:
    """Compares what tensors there are from look to look.

    Args:
        looks: a kind of tensor that has grown at each of so many looks in a row is reported.
        least_bytes: growth over those looks below this is not worth a word.
    """

    def __init__(self, *, looks: int = LOOKS, least_bytes: int = 2**20) -> None:
        whole_number("looks", looks, least=2)
        number("least_bytes", least_bytes, least=0)
        self._least_bytes = least_bytes
        self._seen: deque[tuple[int, dict[Group, tuple[int, int]]]] = deque(maxlen=looks + 1)

    def look(self, step: int) -> list[Growing]:
        """One look, on the loop's thread between two steps. Returns what has been growing, largest first."""
        groups: dict[Group, list[torch.Tensor]] = {}
        for tensor in _tensors():
            groups.setdefault(_group(tensor), []).append(tensor)
        self._seen.append((step, {group: (len(found), _bytes(found)) for group, found in groups.items()}))
        if len(self._seen) < (self._seen.maxlen or 0):
            return []
        first_step, first = self._seen[0]
        growing = []
        for group, found in groups.items():
            counts = [look.get(group, (0, 0))[0] for _, look in self._seen]
            sizes = [look.get(group, (0, 0))[1] for _, look in self._seen]
            grown = sizes[-1] - first.get(group, (0, 0))[1]
            steadily = all(later > earlier for earlier, later in itertools.pairwise(counts))
            if steadily and grown >= self._least_bytes:
                growing.append(_growing(group, found, counts, sizes, max(1, step - first_step)))
        return sorted(growing, key=lambda one: -one.bytes_per_step)


class LeakWatch:
    """Looks every so many steps, and tells of what grows.

    Args:
        every_steps: between two looks.

    Attributes:
        instruments: where the bytes that grow are shown.
        growing: what the last look found.
    """

    def __init__(self, every_steps: int) -> None:
        self.instruments = Instruments()
        self.growing: list[Growing] = []
        self._every_steps, self._steps = every_steps, 0
        self._detector = LeakDetector()
        self._log = get_logger("system")
        self._told: set[Group] = set()

    def step_done(self) -> None:
        """A step has ended; between two steps."""
        self._steps += 1
        if self._steps % self._every_steps:
            return
        self.growing = self._detector.look(self._steps)
        self.instruments.set(catalog.GROWING_TENSOR_BYTES, sum(one.bytes for one in self.growing))
        for one in self.growing[:TOLD]:
            group = (one.device, one.dtype, one.shape)
            if group not in self._told:
                self._told.add(group)
                self._log.warning("tensors_growing", after_steps=self._steps, **asdict(one))


class NoLeakWatch:
    """Looks never."""

    def __init__(self) -> None:
        self.instruments = Instruments()
        self.growing: list[Growing] = []

    def step_done(self) -> None:
        pass


def _growing(
    group: Group, found: list[torch.Tensor], counts: list[int], sizes: list[int], steps: int
) -> Growing:
    device, dtype, shape = group
    newest = found[-HOLDERS:]
    ours = {id(found), id(newest)}
    made_by = Counter(type(t.grad_fn).__name__ for t in found if t.grad_fn is not None)
    held = dict.fromkeys(_holder(tensor, ours) for tensor in newest)
    lines = dict.fromkeys(_made_at(tensor) for tensor in newest)
    return Growing(
        device=device,
        dtype=dtype,
        shape=shape,
        count=counts[-1],
        grown=counts[-1] - counts[0],
        bytes=sizes[-1],
        bytes_per_step=(sizes[-1] - sizes[0]) / steps,
        held_by=tuple(way for way in held if way),
        made_by=tuple(made_by.most_common(HOLDERS)),
        made_at=tuple(line for line in lines if line),
    )


def _tensors() -> Iterable[torch.Tensor]:
    """Live tensors with memory of their own; of several views of one storage the first."""
    seen: set[tuple[str, int]] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thing in all_objects():
            if not issubclass(type(thing), torch.Tensor):  # not isinstance: proxies would run code
                continue
            try:
                storage = thing.untyped_storage()
                key = (str(thing.device), storage.data_ptr())
                size = storage.nbytes()
            except (RuntimeError, NotImplementedError):  # fake, sparse or freed
                continue
            if size and key[1] and key not in seen:
                seen.add(key)
                yield thing


def _group(tensor: torch.Tensor) -> Group:
    return str(tensor.device), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _made_at(tensor: torch.Tensor) -> str | None:
    trace = tracemalloc.get_object_traceback(tensor)
    return None if trace is None else str(trace[-1])


def _holder(tensor: torch.Tensor, ours: set[int]) -> str | None:
    """The shortest way to a tensor from something with a name, or else from the container that holds it.

    None when nothing but frames and C++ holds it. No closures, tuples or comprehensions in here: they would
    be found as holders themselves.
    """
    things: list[Any] = [tensor]
    ways: list[str] = [""]
    ours = ours | {id(things), id(ways)}
    unnamed = None
    number = 0
    while number < len(things) and number < _SEARCHED:
        thing, way = things[number], ways[number]
        number += 1
        referrers = gc.get_referrers(thing)
        ours.add(id(referrers))
        for one in referrers:
            if id(one) in ours or isinstance(one, _NOT_HOLDERS):
                continue
            ours.add(id(one))
            if (name := _name_within(one, thing)) is not None:
                return name + way
            label = _label(one)
            if label is not None:
                things.append(one)
                ways.append(f" → {label}{way}")
                unnamed = unnamed or label + way
    return unnamed


def _name_within(one: Any, thing: Any) -> str | None:
    """What a person would call the place where `one` holds `thing`; None for a place without a name."""
    if isinstance(one, dict):
        owner = _owner(one)
        return None if owner is None else f"{owner}.{_key(one, thing)}"
    namespace = getattr(one, "__dict__", None)
    if isinstance(namespace, dict) and (name := _key(namespace, thing)) is not None:
        return f"{type(one).__qualname__}.{name}"
    for kind in type(one).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if getattr(one, slot, None) is thing:
                return f"{type(one).__qualname__}.{slot}"
    return None


def _label(one: Any) -> str | None:
    """A container without a name of its own; None for what is not worth following."""
    if isinstance(one, types.CellType):
        return "closure"
    if isinstance(one, (dict, list, tuple, deque, set)):
        return f"{type(one).__name__} of {len(one)}"
    return None


def _key(namespace: dict[Any, Any], thing: Any) -> str | None:
    for key, value in namespace.items():
        if value is thing:
            return str(key)
    return None


def _owner(namespace: dict[Any, Any]) -> str | None:
    """Whose attributes these are: a module's or an object's."""
    name = namespace.get("__name__")
    if isinstance(name, str) and "__spec__" in namespace:
        return name
    for one in gc.get_referrers(namespace):
        if getattr(type(one), "__dictoffset__", 0) and getattr(one, "__dict__", None) is namespace:
            return type(one).__qualname__
    return None
