"""LLaVA's picture and prompt helpers: geometry by hand-computed values, ids by a locally built tokenizer."""

from __future__ import annotations

import base64
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from llava import mm_utils
from llava.constants import IMAGE_TOKEN_INDEX
from llava.utils import UserError

V16_GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@pytest.fixture(scope="module")
def processor():
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture(scope="module")
def tokenizer():
    words = ["<s>", "</s>", "<unk>", "yes", "no", "left", "lung", "where", "#", "##"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("size", "best"),
    [
        ((800, 400), (672, 336)),
        ((400, 800), (336, 672)),
        ((700, 700), (672, 672)),
        ((2000, 500), (1008, 336)),
        ((100, 100), (336, 672)),
    ],
)
def test_best_resolution_keeps_pixels_then_wastes_least(size, best):
    assert mm_utils.select_best_resolution(size, [tuple(pair) for pair in V16_GRID]) == best


def test_grid_shape_counts_columns_and_rows_from_list_or_text():
    assert mm_utils.get_anyres_image_grid_shape((800, 400), V16_GRID, 336) == (2, 1)
    assert mm_utils.get_anyres_image_grid_shape((400, 800), str(V16_GRID), 336) == (1, 2)


def test_broken_grid_is_refused():
    with pytest.raises(UserError, match="image_grid_pinpoints"):
        mm_utils.get_anyres_image_grid_shape((8, 8), "[[336,", 336)


def test_resize_and_pad_centres_on_black():
    padded = np.asarray(mm_utils.resize_and_pad_image(Image.new("RGB", (20, 10), (255, 255, 255)), (40, 40)))
    assert padded.shape == (40, 40, 3)
    assert padded[:10].max() == 0 and padded[30:].max() == 0 and padded[10:30].min() == 255


def test_patches_come_row_by_row():
    picture = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
    assert [int(np.asarray(patch)[0, 0]) for patch in mm_utils.divide_to_patches(picture, 2)] == [0, 2, 8, 10]


@pytest.mark.parametrize(("size", "box"), [((10, 4), (0, 3, 10, 7)), ((4, 10), (3, 0, 7, 10))])
def test_expand2square_puts_the_picture_in_the_middle(size, box):
    square = mm_utils.expand2square(Image.new("RGB", size, (9, 9, 9)), (1, 2, 3))
    assert square.size == (10, 10)
    pixels = np.asarray(square)
    inside = np.zeros((10, 10), dtype=bool)
    inside[box[1] : box[3], box[0] : box[2]] = True
    assert (pixels[inside] == 9).all() and (pixels[~inside] == (1, 2, 3)).all()


def test_square_picture_is_not_copied():
    picture = Image.new("RGB", (5, 5))
    assert mm_utils.expand2square(picture, (0, 0, 0)) is picture


def test_pad_keeps_the_borders_that_square_crops(processor):
    wide = np.full((20, 60, 3), 128, dtype=np.uint8)
    wide[:, :4] = 255
    pictures = [Image.fromarray(wide)]
    padded = mm_utils.process_images(pictures, processor, SimpleNamespace(image_aspect_ratio="pad"))
    cropped = mm_utils.process_images(pictures, processor, SimpleNamespace(image_aspect_ratio="square"))
    assert padded.shape == cropped.shape == (1, 3, 32, 32)
    assert padded[0, 0, 16, 0] > padded[0, 0, 16, 16] + 1
    assert cropped[0, 0, 16, 0] == pytest.approx(cropped[0, 0, 16, 16].item(), abs=1e-3)


def test_pad_fills_with_the_mean_colour(processor):
    padded = mm_utils.process_images(
        [Image.new("RGB", (64, 16), (0, 0, 0))], processor, SimpleNamespace(image_aspect_ratio="pad")
    )
    assert padded[0, :, 0, 0].abs().max() < 0.02


def test_anyres_gives_the_whole_picture_then_its_tiles(processor):
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=[[64, 32], [32, 64], [64, 64]])
    pixels = np.zeros((32, 64, 3), dtype=np.uint8)
    pixels[:, 32:] = 255
    tiles = mm_utils.process_images([Image.fromarray(pixels)], processor, config)
    assert tiles.shape == (1, 3, 3, 32, 32)
    assert tiles[0, 1].max() < tiles[0, 2].min()
    assert tiles[0, 0, 0, 16, 2] < tiles[0, 0, 0, 16, 29]


def test_pictures_of_different_tile_counts_come_as_a_list(processor):
    config = SimpleNamespace(image_aspect_ratio="anyres", image_grid_pinpoints=[[64, 32], [64, 64]])
    tensors = mm_utils.process_images([Image.new("RGB", (64, 32)), Image.new("RGB", (64, 64))], processor, config)
    assert [tensor.shape[0] for tensor in tensors] == [3, 5]


def test_image_token_stands_between_stretches_with_one_bos(tokenizer):
    ids = mm_utils.tokenizer_image_token("where <image> left <image> lung", tokenizer)
    assert ids == [0, 7, IMAGE_TOKEN_INDEX, 5, IMAGE_TOKEN_INDEX, 6]
    assert mm_utils.tokenizer_image_token("<image>yes", tokenizer) == [0, IMAGE_TOKEN_INDEX, 3]
    assert mm_utils.tokenizer_image_token("yes", tokenizer) == tokenizer("yes")["input_ids"]
    assert torch.equal(mm_utils.tokenizer_image_token("yes", tokenizer, return_tensors="pt"), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="unsupported tensor type"):
        mm_utils.tokenizer_image_token("yes", tokenizer, return_tensors="tf")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("liuhaotian/llava-v1.5-7b", "llava-v1.5-7b"),
        ("/models/llava-vqa-rad_abd/", "llava-vqa-rad_abd"),
        ("output/llava-abd/checkpoint-12", "llava-abd_checkpoint-12"),
        ("C:\\models\\llava-abd\\checkpoint-3", "llava-abd_checkpoint-3"),
    ],
)
def test_model_name_from_path(path, name):
    assert mm_utils.get_model_name_from_path(path) == name


def test_empty_model_path_is_refused():
    with pytest.raises(UserError, match="model path is empty"):
        mm_utils.get_model_name_from_path(" ")


def test_base64_round_trip_and_refusal():
    buffer = BytesIO()
    Image.new("RGB", (3, 2), (7, 8, 9)).save(buffer, format="PNG")
    assert mm_utils.load_image_from_base64(base64.b64encode(buffer.getvalue())).getpixel((0, 0)) == (7, 8, 9)
    with pytest.raises(UserError, match="no readable picture"):
        mm_utils.load_image_from_base64("aGVsbG8=")


def test_keyword_stops_each_row_for_itself(tokenizer):
    prompt = torch.tensor([[0, 7], [0, 7]])
    stop = mm_utils.KeywordsStoppingCriteria(["lung"], tokenizer, prompt)
    assert stop(torch.tensor([[0, 7, 3, 6], [0, 7, 3, 5]]), None).tolist() == [True, False]


def test_keyword_in_the_prompt_does_not_stop_but_new_tokens_alone_do(tokenizer):
    prompt = torch.tensor([[0, 6]])
    stop = mm_utils.KeywordsStoppingCriteria(["lung"], tokenizer, prompt)
    assert stop(torch.tensor([[0, 6, 3]]), None).tolist() == [False]
    assert stop(torch.tensor([[3, 6]]), None).tolist() == [True]


def test_keyword_spelt_with_other_tokens_stops(tokenizer):
    stop = mm_utils.KeywordsStoppingCriteria(["##"], tokenizer, torch.tensor([[0]]))
    assert stop(torch.tensor([[0, 3, 9]]), None).tolist() == [True]
