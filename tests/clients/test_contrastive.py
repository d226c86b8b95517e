"""Contrastive decoding: a loop of one's own with the picture, a noised one or none, each branch with its cache."""

from __future__ import annotations

import math

import pytest
import torch
from clients.room import NEW, ROWS, one_row, open_prompt, with_mark

from llava.mm_utils import process_images

ALPHA, BETA = 1.0, 0.1


def noised(pictures, seed=0):
    """A diffusion step over the pixels."""
    return 0.6 * pictures + 0.8 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(seed))


def contrast(logits, other, alpha=ALPHA, beta=BETA):
    """The plausible tokens by how much the picture speaks for them."""
    cutoff = math.log(beta) + logits.max(-1, keepdim=True).values
    return ((1 + alpha) * logits - alpha * other).masked_fill(logits < cutoff, -math.inf)


class Branch:
    """One of the loop's two: a prompt, its pictures, and what its last call left."""

    def __init__(self, model, first, step):
        self.model, self.first, self.step, self.past, self.mask = model, first, step, None, None

    def logits(self, token):
        """Of the next token, after ``token`` (None: after the prompt)."""
        if token is None:
            outputs = self.model(**self.first, use_cache=True, return_dict=True)
            length = outputs.logits.shape[1]
            self.mask = torch.ones(1, length, dtype=torch.long)
        else:
            self.mask = torch.cat([self.mask, self.mask.new_ones(1, 1)], dim=1)
            outputs = self.model(
                input_ids=token[:, None],
                past_key_values=self.past,
                attention_mask=self.mask,
                use_cache=True,
                return_dict=True,
                **self.step,
            )
        self.past = outputs.past_key_values
        return outputs.logits[:, -1, :]


def decode(branch, other, eos, alpha=ALPHA):
    """Greedy tokens of the contrast between two branches, called in turn."""
    tokens, token = [], None
    for _ in range(NEW):
        logits, against = branch.logits(token), other.logits(token)
        token = contrast(logits, against, alpha).argmax(-1)
        tokens.append(int(token))
        if tokens[-1] == eos:
            break
    return tokens


def two_steps(model, input_ids, pictures):
    """The prompt as embeddings, as the ports of these loops to LLaVA 1.2 make it."""
    _, _, mask, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
        input_ids, None, torch.ones_like(input_ids), None, None, pictures
    )
    return {"inputs_embeds": embeds, "attention_mask": mask}


def told(side, input_ids, question, shown):
    """The branch as it must be: the engine's model, its route given at every call."""
    model = side.engine.model
    route = {}
    if side.is_stage:
        features = model.vision_features([shown] if shown is not None else [[]])
        found = model.route(
            model.retriever.encode_questions([question]),
            model.image_query(features, [shown] if shown is not None else [[]]),
        )
        route = {"slot_indices": found.slot_indices, "slot_weights": found.slot_weights}
    first = {"input_ids": input_ids} | ({} if shown is None else {"images": [shown]})
    return Branch(model, first | route, route)


@pytest.mark.parametrize("how", ["two steps", "pictures at every call"])
@pytest.mark.parametrize("against", ["a noised picture", "no picture"])
@torch.inference_mode()
def test_the_loop(side, how, against):
    """With contrast as the engine's model in the same loop; without it the answer itself."""
    tokenizer, model, image_processor, _ = side.loaded
    for row in ROWS[:3]:
        (image,) = side.opened(row["image"])
        pictures = process_images([image], image_processor, model.config)
        ids = one_row(open_prompt(side.template, with_mark(model.config, row["text"])), tokenizer, model)
        blind = one_row(open_prompt(side.template, row["text"]), tokenizer, model)

        def branch(input_ids, shown):
            if shown is None:
                return Branch(model, {"input_ids": input_ids}, {})
            if how == "two steps":
                return Branch(model, two_steps(model, input_ids, shown), {})
            return Branch(model, {"input_ids": input_ids, "images": shown}, {"images": shown})

        other = noised(pictures) if against == "a noised picture" else None
        against_ids = blind if other is None else ids
        found = decode(branch(ids, pictures), branch(against_ids, other), tokenizer.eos_token_id)
        expected = decode(
            told(side, ids, row["text"], pictures[0]),
            told(side, against_ids, row["text"], None if other is None else other[0]),
            tokenizer.eos_token_id,
        )
        assert found == expected
        plain = decode(branch(ids, pictures), branch(against_ids, other), tokenizer.eos_token_id, alpha=0.0)
        assert tokenizer.decode(plain, skip_special_tokens=True).strip() == side.texts([row])[0]
