"""The image query: what routing sees of a picture. It costs no second forward pass.

- ``tower``: the vision tower's features, which the answer needs anyway, averaged over patches and tiles.
- ``picture``: the layout of edges, from the pixels that the tower gets: a histogram of gradient directions in each of
  6 x 6 fields. Organs and modalities differ in it plainly, also where the tower is small or of another domain.
- ``tower+picture`` (stage 1's default): both, each of unit length, side by side.

Each picture is described by itself, so that its query does not depend on its batch; a question about several pictures
has the mean of their queries, each part again of unit length where a picture's is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FIELDS, DIRECTIONS, PIXELS = 6, 8, 64
PICTURE_DIM = FIELDS * FIELDS * DIRECTIONS


def image_query_dim(kind: str, tower_dim: int) -> int:
    """Length of an image query of ``kind``."""
    return ("tower" in kind) * tower_dim + ("picture" in kind) * PICTURE_DIM


def image_queries(kind: str, features: list[list[Tensor]], pixels: list[list[Tensor]], dim: int) -> Tensor:
    """Image queries ``[batch, dim]`` float32; zeros for a sample without a picture, which no key prefers.

    Args:
        features: tower features per sample and picture, ``[tiles, patches, tower_dim]`` (unused by ``picture``).
        pixels: the same pictures as the tower got them, ``[tiles, 3, h, w]`` (unused by ``tower``).

    Raises:
        ValueError: an empty batch, or pixels are needed and missing.
    """
    if not features:
        raise ValueError("this model routes on pictures and questions, but the batch has neither")
    if any(len(sample) > 1 for sample in features):
        seen = pixels if len(pixels) == len(features) else [[] for _ in features]
        rows = [_of_sample(kind, *parts, dim) for parts in zip(features, seen, strict=True)]
        device = next(sample[0].device for sample in features if sample)
        return torch.stack([row.to(device) for row in rows])
    if kind == "tower":
        return pooled_features(features, dim)
    if [len(sample) for sample in features] != [len(sample) for sample in pixels]:
        raise ValueError(f"image queries of kind {kind!r} need the pictures' pixels: give images, or image_query")
    described = pooled_descriptors(pixels)
    if kind == "picture":
        return described
    tower = pooled_features(features, dim - PICTURE_DIM)
    return torch.cat([F.normalize(tower, dim=-1), described.to(tower.device)], dim=-1)


def joined_query(kind: str, queries: Sequence[Tensor]) -> Tensor:
    """The query ``[image_dim]`` of a question about one or several pictures, from the query of each."""
    if len(queries) == 1:
        return queries[0]
    mean = torch.stack(list(queries)).mean(0)
    if kind == "tower":
        return mean
    tower, described = mean[:-PICTURE_DIM], mean[-PICTURE_DIM:]  # no tower part in kind "picture"
    return torch.cat([F.normalize(tower, dim=-1), F.normalize(described, dim=-1)])


def _of_sample(kind: str, features: list[Tensor], pixels: list[Tensor], dim: int) -> Tensor:
    """The query ``[dim]`` of one sample."""
    if not features:
        return torch.zeros(dim)
    seen = [[picture] for picture in pixels] if len(pixels) == len(features) else [[] for _ in features]
    parts = [image_queries(kind, [[feature]], [tiles], dim)[0] for feature, tiles in zip(features, seen, strict=True)]
    return joined_query(kind, parts)


def pooled_features(features: list[list[Tensor]], width: int) -> Tensor:
    """Tower features averaged over patches, tiles and pictures, ``[batch, width]`` float32."""
    zero = torch.zeros(width)
    pooled = [
        torch.stack([picture.float().mean(dim=(0, 1)) for picture in sample]).mean(0) if sample else zero
        for sample in features
    ]
    device = next((row.device for row in pooled if row is not zero), zero.device)
    return torch.stack([row.to(device) for row in pooled])


def pooled_descriptors(pixels: list[list[Tensor]]) -> Tensor:
    """Descriptors of each sample's pictures, averaged and of unit length: ``[batch, PICTURE_DIM]`` float32."""
    rows = []
    for sample in pixels:
        found = [describe_picture(picture[0]) for picture in sample]  # the first tile is the whole picture
        rows.append(torch.stack(found).mean(0) if found else torch.zeros(PICTURE_DIM))
    device = next((row.device for row, sample in zip(rows, pixels, strict=True) if sample), torch.device("cpu"))
    return F.normalize(torch.stack([row.to(device) for row in rows]), dim=-1)


def describe_picture(pixels: Tensor) -> Tensor:
    """``[3, h, w] -> [PICTURE_DIM]``: square roots of the gradient histogram, unit length; zeros if all is flat.

    Brightness and contrast cancel out, so the processor's normalisation does not matter.
    """
    grey = F.adaptive_avg_pool2d(pixels.detach().float().mean(0)[None, None], PIXELS)[0, 0]
    across = grey[1:-1, 2:] - grey[1:-1, :-2]
    down = grey[2:, 1:-1] - grey[:-2, 1:-1]
    strength = torch.hypot(across, down)  # [62, 62]
    turn = torch.atan2(down, across) / torch.pi % 1 * DIRECTIONS  # an edge and its reverse are alike
    lower = turn.floor()
    share = turn - lower
    bins = torch.arange(DIRECTIONS, device=grey.device)[:, None, None]
    weight = (lower % DIRECTIONS == bins) * (1 - share) + ((lower + 1) % DIRECTIONS == bins) * share
    histogram = F.adaptive_avg_pool2d((strength * weight)[None], FIELDS)[0]  # [directions, fields, fields]
    return F.normalize(histogram.clamp_min(0).sqrt().flatten(), dim=0)
