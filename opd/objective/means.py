"""Metrics as (sum, count), so that the mean over micro-batches and processes is exact."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(slots=True)
class Means:
    """Running means by name: `sums[name] / counts[name]`."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, total: float, count: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0.0) + count

    def add_tensors(self, stats: Mapping[str, Tensor]) -> None:
        """Add every element of each tensor with a count of one."""
        for name, values in stats.items():
            self.add(name, float(values.double().sum()), values.numel())

    def to_tensor(self, device: torch.device) -> Tensor:
        """Return (names, 2) in float64, sorted by name."""
        return torch.tensor([[self.sums[name], self.counts[name]] for name in sorted(self.sums)], dtype=torch.float64, device=device)

    def from_tensor(self, reduced: Tensor) -> "Means":
        """Return the same names with sums and counts of all processes."""
        rows = reduced.tolist()
        names = sorted(self.sums)
        return Means({name: row[0] for name, row in zip(names, rows, strict=True)}, {n: row[1] for n, row in zip(names, rows, strict=True)})

    def means(self) -> dict[str, float]:
        return {name: self.sums[name] / self.counts[name] for name in self.sums if self.counts[name]}
