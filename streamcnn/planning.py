"""A plan under a limit: stages with named claims, their table, the largest chunk that fits, and the refusal when none does."""

import html
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from streamcnn.drawing import table_html
from streamcnn.errors import MemoryBudgetError
from streamcnn.memory import claims_table, format_bytes

CHUNK_SIZES = (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
# chunks leave a fifth of the limit unplanned, unless some stage takes more whatever the chunk
COMFORT = 0.8
# more images than 16 threads take in full vectors make nothing faster, so beyond them chunks grow only while they take little
_ENOUGH_IMAGES, _LITTLE_BYTES = 256, 64 << 20
# measured: what equal processes hold on entry differs by 1 MiB or less
_ENTRY_SPREAD = 3 << 20
# a process with the libraries alone takes more
_FEWEST_MIB = 64


@dataclass
class StagePlan:
    """One stage of a plan.

    Attributes
    ----------
    name : str
    claims : dict of str to int
        Its buffers in bytes, by name.
    passes : int
        How often it reads the images or rows.
    disk_bytes : int
        What it writes to disk.
    total : int
        Sum of its claims.
    """

    name: str
    claims: dict[str, int]
    passes: int = 1
    disk_bytes: int = 0

    @property
    def total(self) -> int:
        return sum(self.claims.values())


def added(*parts: dict[str, int]) -> dict[str, int]:
    """Claims of several parts; what two of them call by the same name adds up."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return {name: int(size) for name, size in total.items() if size}


def reserve(n_bytes: int) -> int:
    """What allocators round up and keep of `n_bytes`: a fortieth, 16 MiB at least. So a run that takes all of its plan stays below
    the 98 % of the limit at which it would stop."""
    return max(16 << 20, n_bytes // 40)


@dataclass(repr=False)
class MemoryPlan:
    """What runs under a limit: the claims of every stage on top of what the process holds anyway.

    Attributes
    ----------
    limit : int
        Bytes.
    base : dict of str to int
        What the process holds whatever the stage; the first claim is what it held when the plan was made.
    chunk_size : int
        Images per kernel call.
    stages : list of StagePlan
    """

    limit: int
    base: dict[str, int]
    chunk_size: int
    stages: list[StagePlan]

    @property
    def base_bytes(self) -> int:
        return sum(self.base.values())

    @property
    def peak_bytes(self) -> int:
        """Planned peak of resident memory of the process."""
        return max(self.planned(stage.name) for stage in self.stages)

    @property
    def disk_bytes(self) -> int:
        return sum(stage.disk_bytes for stage in self.stages)

    def stage(self, name: str) -> StagePlan:
        """The stage of that name."""
        return next(stage for stage in self.stages if stage.name == name)

    def planned(self, name: str) -> int:
        """Planned resident memory of the process while a stage runs."""
        held = self.base_bytes + self.stage(name).total
        return held + reserve(held)

    @property
    def smallest_limit(self) -> int:
        """A limit in bytes, of whole MiB, that would do: the next process may hold a little more on entry than this one."""
        return -(-(self.peak_bytes + _ENTRY_SPREAD) // (1 << 20)) << 20

    def check(self) -> None:
        """Refuse a plan that does not fit.

        Raises
        ------
        MemoryBudgetError
            With the itemised table, the smallest limit that would do, and what would lower it.
        """
        if self.peak_bytes <= self.limit:
            return
        if self.limit < 1 << 20:
            few, unit = f"{self.limit} byte{'s' if self.limit > 1 else ''}", "MiB" if self.limit >= _FEWEST_MIB else "GiB"
            raise MemoryBudgetError(f'memory_limit is {few}, which nothing fits: give it a unit, such as "{self.limit}{unit}"')
        worst = max(self.stages, key=lambda stage: stage.total)
        largest = max(worst.claims, key=lambda name: worst.claims[name])
        claims, in_use = added(self.base, worst.claims), self.base["already in use"]
        crowded = f" ({format_bytes(in_use)} are in use already)" if 2 * in_use > self.limit else ""
        # nothing that a stage could save makes room for what every stage holds
        helps = self.base_bytes + reserve(self.base_bytes) <= self.limit
        way = f"; or {text}" if helps and (text := self._way()) else ""
        raise MemoryBudgetError(
            f"memory_limit of {format_bytes(self.limit)} is too small: set memory_limit to at least {self.smallest_limit >> 20}MiB "
            f"(--memory-limit), as stage {worst.name} needs that{crowded}, and the largest of its own buffers is {largest}{way}\n"
            f"memory of stage {worst.name}:\n" + claims_table(claims | {"reserve": reserve(sum(claims.values()))})
        )

    def _way(self) -> str:
        """What else would make it fit, empty where nothing is known that would."""
        return ""

    def _rows(self) -> list[tuple[str, str, str, str, str]]:
        rows = []
        for s in self.stages:
            largest = sorted(s.claims.items(), key=lambda item: -item[1])[:3]
            text = ", ".join(f"{name} {format_bytes(n)}" for name, n in largest)
            rows.append((s.name, format_bytes(self.planned(s.name)), format_bytes(s.disk_bytes), str(s.passes), text))
        return rows

    def notes(self) -> list[str]:
        """What else there is to say, a sentence a line."""
        base = ", ".join(f"{name} {format_bytes(n)}" for name, n in self.base.items())
        return [
            f"{self.chunk_size} images a chunk; in every stage: {base}",
            f"planned peak {format_bytes(self.peak_bytes)} of {format_bytes(self.limit)}; disk {format_bytes(self.disk_bytes)}",
        ]

    _HEAD = ("stage", "memory", "disk", "passes", "largest buffers")

    def __str__(self):
        lines = [f"{a:<10} {b:>10} {c:>10} {d:>7}  {e}" for a, b, c, d, e in [self._HEAD, *self._rows()]]
        return "\n".join(lines + self.notes())

    __repr__ = __str__

    def _repr_html_(self):
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes())
        return table_html(self._rows(), self._HEAD, left=(0, 4)) + notes

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        stages = [
            {"name": s.name, "bytes": self.planned(s.name), "claims": s.claims, "passes": s.passes, "disk_bytes": s.disk_bytes}
            for s in self.stages
        ]
        sizes = {"memory_limit_bytes": self.limit, "already_in_use_bytes": self.base["already in use"], "base_claims": self.base}
        sizes |= {"planned_peak_bytes": self.peak_bytes, "disk_bytes": self.disk_bytes}
        return sizes | {"stages": stages, "chunk_size": self.chunk_size}


AnyPlan = TypeVar("AnyPlan", bound=MemoryPlan)


def choose_chunk(limit: int, largest: int, build: Callable[[int], "AnyPlan"]) -> "AnyPlan":
    """The plan of the largest chunk, of about `largest` images at most, that fits.

    Its peak is at most 80 % of the limit, or what the smallest chunk needs where that is more; with more than 256 images also at most
    64 MiB above that of the smallest.

    Raises
    ------
    MemoryBudgetError
        When the smallest does not fit either.
    """
    smallest = build(CHUNK_SIZES[-1])
    smallest.check()
    allowed = max(COMFORT * limit, smallest.peak_bytes)
    few = min(allowed, smallest.peak_bytes + _LITTLE_BYTES)
    plans = (build(chunk) for chunk in CHUNK_SIZES if chunk < 2 * largest)
    return next(made for made in plans if made.peak_bytes <= (few if made.chunk_size > _ENOUGH_IMAGES else allowed))
