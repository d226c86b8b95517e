"""A model whose layers lie on two GPUs, as ``device_map="auto"`` places them, which are pretended."""

import pretend_gpu
import pytest
import torch
from accelerate.utils import send_to_device
from tiny_llava import LAYERS, write_base, write_stage

from llava.data.labels import conversation_ids
from llava.model.builder import load_pretrained_model

QUESTIONS = ("is there a lesion", "what side", "where is the lesion in the left lung")


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Folders of a stage and its base."""
    folder = tmp_path_factory.mktemp("two")
    base = write_base(folder / "tiny-base")
    return str(write_stage(folder / "llava-tiny_abd_chest", base)), str(base)


def spread(model, tower):
    """Place the model's parts as accelerate does: a hook moves what a part is given to the part's GPU."""
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1, "retriever": 0}
    places |= {"model.vision_tower": tower, "model.mm_projector": 1}
    places |= {f"model.layers.{number}": number * 2 // LAYERS for number in range(LAYERS)}
    for name, number in places.items():
        part, device = model.get_submodule(name), torch.device("cuda", number)
        pretend_gpu.move(part, device)

        def bring(module, args, kwargs, device=device):
            return send_to_device(args, device), send_to_device(kwargs, device)

        if name not in ("retriever", "model.vision_tower"):  # the tower moves its pictures itself
            part.register_forward_pre_hook(bring, with_kwargs=True)


@pytest.mark.parametrize("tower", [0, 1])
def test_answers_are_those_of_one_device(stage, tower):
    tokenizer, model = load_pretrained_model(*stage, device="cpu")[:2]
    rows = [conversation_ids([("human", text)], tokenizer, "vicuna_v1", 1)[0] for text in QUESTIONS]
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(len(rows), 3, 16, 16, generator=generator)
    more = {"max_new_tokens": 4, "pad_token_id": 0}

    def answers():
        found = [model.generate(torch.tensor([ids]), images=p[None], **more) for ids, p in zip(rows, pictures)]
        return [answer.tolist() for answer in found], model.last_route.slot_indices.tolist()

    expected = answers()
    spread(model, tower)
    with pretend_gpu.pretending(pretend_gpu.Log()):
        assert answers() == expected
