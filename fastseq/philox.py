"""Which weights of attention dropout keeps, in torch's operations: the function that csrc/cpu/philox.h has.

Philox4x32-10, Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LANES = 16  # of each 64 keys, from a multiple of 64 on, key 16 w + i takes word w of lane i
_WORD = (1 << 32) - 1


def _multiply_wide(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of a product of words, which lie in 64 bits with a sign."""
    product = x * factor
    return (product >> 32) & _WORD, product & _WORD


def kept(dropout_p: float, seed: Tensor, head: Tensor, query: Tensor, keys: tuple[int, int]) -> Tensor:
    """(..., keys), bool: whether the weight is kept.

    head: of all sequences, int64, broadcasts with query, the row of its sequence; keys: from and to which of
    its sequence. seed: one int64 on their device.
    """
    first, end = keys
    begin = first // (4 * _LANES) * _LANES
    counters = torch.arange(begin, -(-end // (4 * _LANES)) * _LANES, device=query.device)
    head, query = head.unsqueeze(-1), query.unsqueeze(-1)
    low, high = seed & _WORD, (seed >> 32) & _WORD
    words = [counters & _WORD, query & _WORD, head & _WORD, query >> 32]
    for _ in range(10):
        high_0, low_0 = _multiply_wide(words[0], 0xD2511F53)
        high_2, low_2 = _multiply_wide(words[2], 0xCD9E8D57)
        words = [high_2 ^ words[1] ^ low, low_2, high_0 ^ words[3] ^ high, low_0]
        low, high = (low + 0x9E3779B9) & _WORD, (high + 0xBB67AE85) & _WORD
    threshold = int((1 - dropout_p) * 4294967295.0 + 0.5)
    below = torch.stack(torch.broadcast_tensors(*(word < threshold for word in words)), -2)
    below = below.unflatten(-1, (-1, _LANES)).transpose(-3, -2).flatten(-3)  # groups of words of lanes
    return below[..., first - 4 * begin : end - 4 * begin]
