"""Sign votes on the elements of several matrices, as TIES has them: the one election of all methods.

Matrices are (out, in) float32 and contiguous, and are changed in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .sparsify import pieces

_LEAST = 1e-30  # Keeps a division by no votes finite.
# Up to this many LoRAs all votes of a layer are held at once: no more memory than adding them up takes.
_HELD = 3


def elect(votes: Iterable[Tensor], weights: Sequence[float], factor: float, *, normalize: bool) -> Tensor:
    """(out, in) float32: the sum of the winners' votes, or their mean.

    Args:
        votes: One matrix for each weight, used up; few are held at once, of many one at a time.
        weights: What each is multiplied by first.
        factor: Of the result.
        normalize: The mean of the winners and not their sum.
    """
    if len(weights) <= _HELD:
        return elected(list(votes), weights, factor, normalize=normalize)
    election: Election | None = None
    for matrix, weight in zip(votes, weights, strict=True):
        election = election or Election(matrix)
        election.cast(matrix, weight)
    assert election is not None
    return election.result(factor, normalize=normalize)


def elected(
    votes: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    factor: float = 1.0,
    *,
    normalize: bool = True,
) -> Tensor:
    """What :class:`Election` gives, from all votes at once: several times faster, but it has to hold them.

    Args:
        votes: At least one matrix; used up, the first one's memory becomes that of the result.
        weights: What each is multiplied by first.
        factor: Of the result.
        normalize: The mean of the winners and not their sum.
    """
    for own in pieces(*votes):
        if weights is not None:
            for vote, weight in zip(own, weights):
                vote.mul_(weight)
        signs = own[0].clone()
        for vote in own[1:]:
            signs += vote
        signs.sign_()
        total, count = torch.zeros_like(signs), torch.zeros_like(signs)
        for vote in own:
            winning = vote.mul_(signs).clamp_(min=0)
            total += winning
            count += winning.sign_()
        if normalize:
            total /= count.clamp_(min=1)
        torch.mul(total, signs, out=own[0]).mul_(factor)
    return votes[0]


class Election:
    """Sign votes for every element, and the sums of those on either side.

    Votes are added up as they come, so memory does not grow with the number of LoRAs. The sign with the
    larger sum wins; a draw elects 0, as sgn does in the TIES paper. PEFT and mergekit count it as plus,
    which would turn a LoRA merged with its own negative into its absolute values.
    """

    def __init__(self, like: Tensor, *, weighted: bool = False):
        """Args:
        like: A matrix of the layer's shape and device.
        weighted: Votes come with an importance, which does not take part in the election.
        """
        self.plus, self.minus = torch.zeros_like(like), torch.zeros_like(like)
        counts = torch.float32 if weighted else torch.uint8
        self.plus_count = torch.zeros_like(like, dtype=counts)
        self.minus_count = torch.zeros_like(like, dtype=counts)
        self.total = torch.zeros_like(like) if weighted else None

    def cast(self, votes: Tensor, weight: float, importance: float = 1.0) -> None:
        """Add the votes ``weight * votes``; a zero does not vote."""
        sums = [self.plus, self.minus, self.plus_count, self.minus_count]
        for piece, *own in pieces(votes, *sums, *([] if self.total is None else [self.total])):
            plus, minus, plus_count, minus_count = own[:4]
            vote = piece * weight
            if self.total is not None:
                own[4].add_(vote)
            sign = vote.sign()
            positive = sign.clamp(min=0)
            for count, voted in ((plus_count, positive), (minus_count, positive - sign)):
                count.add_(voted.to(count.dtype), alpha=1 if self.total is None else importance)
            plus.add_(vote.clamp(min=0), alpha=importance)
            minus.add_(vote.clamp_(max=0), alpha=importance)

    def result(self, factor: float = 1.0, *, normalize: bool = True) -> Tensor:
        """(out, in) float32: the winners' sum, divided by their number (or importance) if ``normalize``.

        Used once: the memory of the votes becomes that of the result.
        """
        total = self.plus if self.total is None else self.total
        sums = (self.plus, self.minus, self.plus_count, self.minus_count, total)
        for plus, minus, plus_count, minus_count, votes in pieces(*sums):
            sign = plus.add(minus).sign_() if self.total is None else votes.sign()
            won = sign.clamp(min=0)
            lost = won - sign
            chosen = plus * won + minus * lost
            if normalize:
                chosen /= (plus_count * won + minus_count * lost).clamp_(min=_LEAST)
            plus.copy_(chosen.mul_(factor))
        return self.plus
