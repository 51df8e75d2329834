"""The order of a source's samples: one seeded permutation per epoch, never stored, any place of it cheap to compute.

Shards are shuffled as wholes, neighbours in that order are joined to blocks of about `SHUFFLE_BLOCK` samples, and samples are shuffled
within their block. So reads stay inside a few shards for a long time, which object storage and page caches like, and the memory needed
is a block's, not a corpus's. A source of fewer samples than a block is shuffled as a whole.

Random bits come straight from a Philox generator, whose stream NumPy guarantees for all versions (`Generator.permutation` it does not):
the order of a resumed run survives an upgrade.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

SHUFFLE_BLOCK = 65_536
"""Samples shuffled together at least (unless the source is smaller)."""

Ints = NDArray[np.int64]


def seeded_permutation(count: int, *key: int) -> Ints:
    """A permutation of range(count), a function of the key (ints of any size >= 0) alone."""
    bits = np.random.Philox(np.random.SeedSequence(list(key))).random_raw(count)
    return np.argsort(bits, kind="stable").astype(np.int64)


def name_key(name: str) -> int:
    """A number for a name that does not change when other names come or go."""
    return zlib.crc32(name.encode())


class EpochOrder:
    """The permutation of every epoch of one source."""

    def __init__(self, shard_sizes: Ints, seed: int, name: str, block: int = SHUFFLE_BLOCK) -> None:
        """`shard_sizes`: samples per shard, in the order of the source's sample numbers."""
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.samples = int(self.starts[-1])
        self.key = (seed, name_key(name))
        self.block = block
        self._epoch = lru_cache(maxsize=2)(self._shard_order)
        self._block = lru_cache(maxsize=4)(self._block_order)

    def sample(self, ordinal: int) -> tuple[int, int]:
        """(epoch, sample number) of the ordinal-th draw from the source, counting from 0 over all epochs."""
        epoch, place = divmod(ordinal, self.samples)
        _, block_starts = self._epoch(epoch)
        number = int(np.searchsorted(block_starts, place, side="right")) - 1
        return epoch, int(self._block(epoch, number)[place - block_starts[number]])

    def _shard_order(self, epoch: int) -> tuple[list[Ints], Ints]:
        """Shards of each block, and the first place of each block with the number of samples at the end."""
        order = seeded_permutation(len(self.sizes), *self.key, epoch)
        blocks: list[Ints] = []
        starts = [0]
        first, held = 0, 0
        for at, shard in enumerate(order):
            held += int(self.sizes[shard])
            if held >= self.block or (at == len(order) - 1 and held > 0):
                blocks.append(order[first : at + 1])
                starts.append(starts[-1] + held)
                first, held = at + 1, 0
        return blocks, np.asarray(starts, dtype=np.int64)

    def _block_order(self, epoch: int, number: int) -> Ints:
        blocks, _ = self._epoch(epoch)
        samples = np.concatenate([np.arange(self.starts[shard], self.starts[shard + 1], dtype=np.int64) for shard in blocks[number]])
        return samples[seeded_permutation(len(samples), *self.key, epoch, number + 1)]
