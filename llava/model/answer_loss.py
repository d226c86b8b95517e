"""The loss of a training step from the positions that are answers alone: of the others no logits are computed.

A vocabulary's logits at every position are a large part of a step: 49,152 words at 1,280 positions took four of ten
seconds of a step of a 135M decoder, and of a 7B one 325 MB at four samples, as much again for their gradient.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llava.constants import IGNORE_INDEX


def answer_loss(head: nn.Module, hidden: Tensor, labels: Tensor, items: Any = None) -> tuple[Tensor, Tensor]:
    """The causal cross-entropy on ``labels``, as transformers computes it, and the logits it needed.

    Args:
        head: hidden states to logits.
        hidden: ``[batch, length, hidden]``. labels: ``[batch, length]``, ``IGNORE_INDEX`` outside of answers.
        items: divides the sum, a number or a tensor; by default the answers' tokens here, and 1 where there are none.

    Returns:
        The loss, and the logits ``[answer tokens, vocabulary]`` in the order of the rows.
    """
    wanted = labels[:, 1:].flatten()
    answers = (wanted != IGNORE_INDEX).nonzero().flatten()  # the one thing that the host waits for
    logits = head(hidden[:, :-1].flatten(0, 1)[answers.to(hidden.device)]).float()
    total = nn.functional.cross_entropy(logits, wanted[answers].to(logits.device), reduction="sum")
    divisor = max(len(answers), 1) if items is None else items
    return total / (divisor.to(total.device) if isinstance(divisor, Tensor) else divisor), logits
