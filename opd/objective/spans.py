"""The advantage of a teacher with another tokenizer: of whole spans (`opd.data.spans`), less the lookahead (`opd.objective.lookahead`).

Shapes: `N` tokens of a micro-batch, `C` tokens of a chunk, which has all tokens of a span, `V` vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opd.objective.lookahead import Longer, less_previous


@dataclass(frozen=True, slots=True)
class ScoredSpans:
    """The spans of a micro-batch. Every token of a span gets the advantage of the whole span.

    Args:
        span_N: How many tokens of its span follow each token, -1 for one that is not scored.
        unscored: The advantage of tokens that are not scored.
        previous_N: The last token of the span before, as in `SpanTokens`.
        lookahead_N: The lookahead of the student's tokens before the update, at the ends of spans; None without it.
        longer: The student's longer tokens, with which the first inner step fills `lookahead_N`, chunk by chunk; None at later ones.
    """

    span_N: Tensor
    unscored: float = 0.0
    previous_N: Tensor | None = None
    lookahead_N: Tensor | None = None
    longer: Longer | None = None

    def sums(self, gap_C: Tensor, logits_CV: Tensor, target_C: Tensor, part: slice, temperature: float) -> tuple[Tensor, Tensor]:
        """Return for each token the advantage of its span and the number of its tokens, as `sum_over_spans` does.

        Args:
            gap_C: The advantages of the tokens, of which the student's term has no lookahead yet.
            logits_CV, target_C: The student's logits and its tokens.
        """
        if self.lookahead_N is not None and self.previous_N is not None:
            if self.longer is not None:
                lookahead_C = self.longer.lookahead(logits_CV, target_C, temperature)
                self.lookahead_N[part] = lookahead_C.where(self.span_N[part] == 0, 0.0)
            gap_C = gap_C - less_previous(self.lookahead_N, self.previous_N, part)
        return sum_over_spans(gap_C, self.span_N[part])


def sum_over_spans(value_C: Tensor, span_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each token the sum of the values of its span and the number of its tokens, (C,) each; 0 and 1 where it is not scored.

    Args:
        value_C: Of whole spans, in order.
        span_C: How many tokens of its span follow each token; -1 for one that is not scored.
    """
    is_end_C = (span_C <= 0).long()
    number_C = is_end_C.cumsum(0) - is_end_C  # of the span, counted from 0
    empty_C = torch.zeros(len(span_C), dtype=torch.float64, device=value_C.device)
    # In float64 the order of the additions, which varies on a GPU, does not show; the sum of one value is the value.
    sum_C = empty_C.index_add(0, number_C, value_C.double())[number_C].to(value_C.dtype)
    size_C = empty_C.index_add(0, number_C, torch.ones_like(empty_C))[number_C].to(value_C.dtype)
    return torch.where(span_C < 0, 0.0, sum_C), size_C
