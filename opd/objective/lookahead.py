"""What a token's log-prob says of the text behind the token, which differs between tokenizers.

A tokenizer that joins digits writes "1" only where no digit follows: its log-prob of the token "1" is that of the text "1" and of a
boundary behind it. A tokenizer of single digits writes "1" in both cases. So the log-probs of two models' tokens for the same text are not
of the same event. With the mass of the longer tokens that begin with the same text, and that the other tokenizer would not write, the
log-prob of a token becomes that of its text:

    logp(text) = logp(token) + lookahead,   lookahead = log(1 + sum of p(longer tokens) / p(token))

and what follows is conditional on the text, so that its log-prob loses the lookahead of the token before it. To first order: a longer token
in place of the last one. Between equal tokenizers nothing is longer, and the lookahead is 0 bitwise. `tests/test_spans.py` enumerates what
the correction is for: without it the gradient does not vanish where student and teacher write the same texts equally often.

Shapes: `N` tokens of a micro-batch, `C` tokens of a chunk, `V` vocabulary, `L` pairs of a token and a longer one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd.objective.head import at_least_float32


@dataclass(frozen=True, slots=True)
class Longer:
    """For each token the longer tokens that begin with its text and count.

    Args:
        first_V: Where each token's longer ones begin in `id_L`; one more entry than tokens.
        id_L: The longer tokens, token by token.
    """

    first_V: Tensor
    id_L: Tensor

    @classmethod
    def of(cls, longer: Sequence[Sequence[int]], size: int, device: torch.device | None = None) -> "Longer":
        """Return it from the longer ids of each id. `size`: how many ids the output head has."""
        longer = [[index for index in own if index < size] for own in longer]
        first_V = torch.tensor([0, *map(len, longer)]).cumsum(0)
        return cls(first_V.to(device), torch.tensor([index for own in longer for index in own], dtype=torch.long).to(device))

    @torch.no_grad()
    def lookahead(self, logits_CV: Tensor, id_C: Tensor, temperature: float) -> Tensor:
        """Return the lookahead (C,) in nats of tokens with these logits."""
        begin_C = self.first_V[id_C]
        count_C = self.first_V[id_C + 1] - begin_C
        row_L = torch.arange(len(id_C), device=id_C.device).repeat_interleave(count_C)
        place_L = torch.arange(len(row_L), device=id_C.device) - (count_C.cumsum(0) - count_C - begin_C)[row_L]
        logits_L, own_C = logits_CV[row_L, self.id_L[place_L]], logits_CV.gather(-1, id_C[:, None])[:, 0]
        ratio_L = ((at_least_float32(logits_L) - at_least_float32(own_C)[row_L]) / temperature).double().exp()
        sum_C = torch.zeros(len(id_C), dtype=torch.float64, device=id_C.device).index_add(0, row_L, ratio_L)
        return sum_C.log1p().to(at_least_float32(own_C).dtype)


def less_previous(lookahead_N: Tensor, previous_N: Tensor, part: slice = slice(None)) -> Tensor:
    """Return for a part of the tokens the lookahead of each span, at its last token, less that of the span before it."""
    previous_C = previous_N[part]
    return lookahead_N[part] - torch.where(previous_C >= 0, lookahead_N[previous_C.clamp_min(0)], 0.0)
