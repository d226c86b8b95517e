"""Pre-training of the tiny base's vision tower on generic phantoms, from scratch.

Answers alone teach a tower very slowly where small things are. Here every patch is told what it shows (a spot of which
look and size) and the mean of the patches what the whole picture shows; the two linear heads that say so are thrown
away afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.toy.phantom_draw import LOOKS
from llava.toy.phantom_generic import GenericScene, draw_generic, patch_labels, random_scene

UNKNOWN = -1
PATCH_KINDS = 1 + 2 * len(LOOKS)
PICTURE_KINDS = (1 + len(LOOKS), 5, 2, 2, 2, 2, 2, 2, 2)
"""Classes of each label of the whole picture, in the order of ``picture_labels``."""

SIDE = 3
"""Index of the label that a mirrored picture changes."""

PATCH_WEIGHT = 9.0
_NOTHING_WEIGHT = 0.3


@dataclass
class GenericPictures:
    """Generic pictures with what they show: ``pixels`` uint8 ``[n, size, size]`` and labels."""

    scenes: list[GenericScene]
    pixels: Tensor
    patches: Tensor  # [n, patches, patches]
    labels: Tensor  # [n, len(PICTURE_KINDS)]

    def __len__(self) -> int:
        return len(self.scenes)


def picture_labels(scene: GenericScene) -> list[int]:
    """What the whole picture shows; ``UNKNOWN`` where the question makes no sense."""
    some = scene.look is not None
    return [
        1 + LOOKS.index(scene.look) if scene.look else 0,
        scene.count,
        int(scene.large) if some else UNKNOWN,
        int(scene.right) if some else UNKNOWN,
        UNKNOWN if scene.lower is None else int(scene.lower),
        int(scene.bright_rim),
        int(scene.bright_core),
        int(scene.wide_core),
        int(scene.crossed),
    ]


def draw_pictures(count: int, size: int, patches: int, seed: int) -> GenericPictures:
    """``count`` random generic pictures; ``patches`` is the number of patches along a side."""
    rng = np.random.default_rng([seed, 1])
    scenes = [random_scene(rng) for _ in range(count)]
    pixels = np.empty((count, size, size), np.uint8)
    kinds = np.empty((count, patches, patches), np.int64)
    for index, scene in enumerate(scenes):
        pixels[index], spots = draw_generic(scene, size, rng)
        kinds[index] = patch_labels(scene, spots, patches)
    labels = torch.tensor([picture_labels(scene) for scene in scenes])
    return GenericPictures(scenes, torch.from_numpy(pixels), torch.from_numpy(kinds), labels)


def normalised(pixels: Tensor, mean: float, std: float) -> Tensor:
    """Grey pixels ``[batch, size, size]`` as the image processor would give them, ``[batch, 3, size, size]``."""
    return ((pixels.float() / 255 - mean) / std)[:, None].expand(-1, 3, -1, -1)


class TowerTrainer(nn.Module):
    """A CLIP tower with the two heads that its pre-training needs."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(config)
        width = config.hidden_size
        self.norm = nn.LayerNorm(width)
        self.patch_head = nn.Linear(width, PATCH_KINDS)
        self.picture_head = nn.Linear(width, sum(PICTURE_KINDS))
        with torch.no_grad():
            grid = config.image_size // config.patch_size
            self.tower.embeddings.position_embedding.weight[1:].copy_(_wave_positions(grid, width))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Patch logits ``[batch, patches, kinds]`` and picture logits ``[batch, sum of kinds]``."""
        features = self.norm(self.tower(pixel_values=pixels).last_hidden_state[:, 1:])
        return self.patch_head(features), self.picture_head(features.mean(dim=1))

    def loss(self, pixels: Tensor, patches: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of both heads. ``patches`` ``[batch, side, side]``, ``labels`` ``[batch, questions]``."""
        patch_logits, picture_logits = self(pixels)
        weight = torch.ones(PATCH_KINDS)
        weight[0] = _NOTHING_WEIGHT  # most patches show nothing
        loss = PATCH_WEIGHT * F.cross_entropy(patch_logits.transpose(1, 2), patches.flatten(1), weight=weight)
        for column, logits in enumerate(picture_logits.split(PICTURE_KINDS, dim=-1)):
            known = labels[:, column] != UNKNOWN
            if known.any():
                loss = loss + F.cross_entropy(logits[known], labels[known, column])
        return loss


def tower_batch(pictures: GenericPictures, size: int, step: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, patch labels and picture labels of one step; every other batch is mirrored.

    It depends on the seed and the step alone, so an interrupted training goes on with the same batches.
    """
    rng = np.random.default_rng([seed, 2, step])
    chosen = torch.from_numpy(rng.integers(0, len(pictures), size))
    pixels, patches, labels = pictures.pixels[chosen], pictures.patches[chosen], pictures.labels[chosen].clone()
    if step % 2:
        pixels, patches = pixels.flip(-1), patches.flip(-1)
        side = labels[:, SIDE]
        labels[:, SIDE] = torch.where(side == UNKNOWN, side, 1 - side)
    return pixels, patches, labels


@torch.no_grad()
def tower_accuracy(trainer: TowerTrainer, pictures: GenericPictures, mean: float, std: float) -> float:
    """Share of right picture labels, averaged over the questions."""
    _, logits = trainer(normalised(pictures.pixels, mean, std))
    shares = []
    for column, part in enumerate(logits.split(PICTURE_KINDS, dim=-1)):
        known = pictures.labels[:, column] != UNKNOWN
        shares.append((part.argmax(-1) == pictures.labels[:, column])[known].float().mean())
    return float(torch.stack(shares).mean())


def _wave_positions(grid: int, width: int) -> Tensor:
    """Sines and cosines of row and column, ``[grid * grid, width]``: neighbours start out alike."""
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    places = torch.stack([rows, columns], dim=-1).reshape(-1, 2, 1).float() / grid  # [grid * grid, 2, 1]
    frequencies = torch.pi * 2 ** (5 * torch.arange(width // 4).float() / (width // 4))
    angles = (places * frequencies).flatten(1)  # [grid * grid, width / 2]
    return 0.3 * torch.cat([angles.sin(), angles.cos()], dim=1)
