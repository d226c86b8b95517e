"""Pictures that hold words: an embedding of each picture lies where the decoder has the word for what is seen there.

A decoder learns from captions to say what it sees by way of all its layers. A small one with little data finds no such
way within some hundred steps: it learns how often each answer is right, and reads every picture as one general hint. It
does know where in a text to look for a word it is asked about. So the projector is taught that directly, without the
decoder: for embeddings ``z_i`` of a picture, a word's embedding ``w`` and the mean ``m`` of all words' embeddings ::

    s = (logsumexp_i(SHARPNESS * cos(z_i - m, w - m)) - log(tokens)) / SHARPNESS
    loss = binary cross-entropy of SLOPE * (s - EDGE), over the words known to be true or false of the picture
           + mean of (|z_i - m| / reach - 1)^2

A smooth maximum over the picture's places, so one place is enough for a word to be true; ``reach`` is the mean distance
of the words' embeddings from ``m``, which keeps the picture's among them in length as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHARPNESS = 20.0
SLOPE, EDGE = 15.0, 0.25
UNKNOWN = -1.0
"""In ``truths``: nothing is known of this word and this picture."""


class Naming(nn.Module):
    """The words, and the loss of pictures that should hold them.

    Args:
        words: ``[words, hidden]`` their embeddings. centre: ``[hidden]`` the mean of all the decoder's embeddings.
        reach: mean distance of these from it.
    """

    words: Tensor
    centre: Tensor

    def __init__(self, words: Tensor, centre: Tensor, reach: float) -> None:
        super().__init__()
        self.reach = reach
        self.register_buffer("centre", centre.float(), persistent=False)
        self.register_buffer("words", F.normalize(words.float() - self.centre, dim=-1), persistent=False)

    def scores(self, picture: Tensor) -> Tensor:
        """``s`` of each word ``[words]`` for a picture's embeddings ``[tokens, hidden]``: 1 where one is the word."""
        found = F.normalize(picture.float() - self.centre, dim=-1) @ self.words.T
        return (torch.logsumexp(SHARPNESS * found, 0) - math.log(len(picture))) / SHARPNESS

    def loss(self, pictures: Sequence[Tensor], truths: Tensor) -> Tensor:
        """The loss, in float32.

        Args:
            pictures: each row's embeddings ``[tokens, hidden]``.
            truths: ``[rows, words]``: 1 true, 0 false, ``UNKNOWN``.
        """
        scores = torch.stack([self.scores(picture) for picture in pictures])
        known = truths != UNKNOWN
        logits = SLOPE * (scores - EDGE)[known]
        told = F.binary_cross_entropy_with_logits(logits, truths[known].float(), reduction="sum")
        told = told / max(len(logits), 1)  # of a batch of which nothing is known 0
        length = torch.cat([(picture.float() - self.centre).norm(dim=-1) for picture in pictures])
        return told + ((length / self.reach - 1) ** 2).mean()
