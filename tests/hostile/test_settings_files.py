"""Settings files of others and of users, with a fault in each: one line that names file and field."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_llava import write_base, write_stage
from transformers import CLIPVisionConfig

from llava.checkpoints.checkpoint import Checkpoint
from llava.checkpoints.schemas import FILES, read_settings
from llava.checkpoints.tokenizer import load_tokenizer
from llava.checkpoints.weights import weight_files
from llava.continual.record import read_record
from llava.continual.sequence import load_sequence
from llava.eval.score_schema import read_scores
from llava.files import file_sha256, values_sha256
from llava.model.adapters import adapter_base
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.slots.pool import Pool
from llava.train.deepspeed_config import check_deepspeed_config
from llava.utils import UserError

ROOT = Path(__file__).resolve().parents[2]
WRONG = {
    "a text": "x",
    "a list": [1],
    "an object": {"a": 1},
    "a number": 3.5,
    "negative": -1,
    "true": True,
    "huge": 10**30,
}


def extent(**wrong) -> dict:
    """A task's extent, with parts that are wrong."""
    whole = {"mean": torch.zeros(4), "directions": torch.zeros(2, 4), "variances": torch.ones(2)}
    return whole | {"rest": torch.tensor(1.0), "distances": torch.ones(5)} | wrong


def refused(call, *said) -> None:
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in said), line


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("hostile") / "tiny-base")


@pytest.fixture
def folder(base, tmp_path):
    """A copy of the base; its weights are shared."""
    copied = tmp_path / "llava-copy"
    copied.mkdir()
    for file in base.iterdir():
        place = copied / file.name
        place.hardlink_to(file) if file.suffix == ".safetensors" else shutil.copyfile(file, place)
    return copied


def edited(path: Path, **changes):
    values = json.loads(path.read_text()) if path.is_file() else {}
    for name, value in changes.items():
        target, *rest = name.split("__")
        (values.setdefault(target, {}) if rest else values)[rest[0] if rest else target] = value
    path.write_text(json.dumps(values))
    return path


# -- a checkpoint's config ---------------------------------------------------------------------------------------------

NUMBERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "vision_config__patch_size")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [0, -1, "32", 2.5, True, [32, 32, 32], {}, 10**12], ids=repr)
def test_a_number_of_the_config_that_is_none_is_named(folder, name, value):
    edited(folder / "config.json", **{name: value})
    refused(lambda: Checkpoint.open(folder).config, "config.json", name.split("__")[-1])


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"architectures": "LlavaLlamaForCausalLM"}, "architectures is 'LlavaLlamaForCausalLM'; write a list"),
        ({"architectures": [3]}, "architectures, entry 1"),
        ({"model_type": 3}, "model_type is 3"),
        ({"vision_config": [1]}, "vision_config is [1]; write a JSON object"),
        ({"text_config": "llama"}, "text_config is 'llama'; write a JSON object"),
        (
            {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": None},
            "is 3, which does not divide",
        ),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide"),
        ({"mm_vision_select_layer": "-2"}, "mm_vision_select_layer is '-2'; write an integer"),
        ({"mm_use_im_start_end": "no"}, "mm_use_im_start_end is 'no'; write true or false"),
        ({"image_grid_pinpoints": [[336]]}, "image_grid_pinpoints"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; write a number above 0"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"tokenizer_padding_side": "middle"}, "tokenizer_padding_side is 'middle'; known: left, right"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"mm_projektor_type": "linear", "mm_projector_type": None}, ""),
    ],
)
def test_a_field_of_the_config_is_named(folder, changes, said):
    edited(folder / "config.json", **changes)
    if said:
        refused(lambda: Checkpoint.open(folder).config, "config.json: ", said)
    else:
        assert Checkpoint.open(folder).config["mm_projektor_type"] == "linear"


def test_a_misspelt_field_of_the_config_is_refused_where_the_right_one_is_missing(folder):
    values = json.loads((folder / "config.json").read_text())
    values["mm_projektor_type"] = values.pop("mm_projector_type")
    (folder / "config.json").write_text(json.dumps(values))
    refused(lambda: Checkpoint.open(folder).config, "'mm_projektor_type'; did you mean 'mm_projector_type'?")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "swish9"},
        {"mm_projector_type": "mlp99"},
        {"mm_vision_select_layer": 99},
        {"mm_vision_select_feature": "all"},
        {"vision_config__hidden_act": "swish9"},
        {"vision_config__model_type": "resnet"},
        {"model_type": "llava_gpt", "architectures": ["GPT2LMHeadModel"]},
        {"dtype": "float17"},
        {"rope_scaling": {"rope_type": "spiral"}},
        {"intermediate_size": 8},
        {"vision_config__num_attention_heads": 3},
        {"vision_config__image_size": 8},
    ],
    ids=str,
)
def test_a_model_that_cannot_be_built_is_one_line(folder, changes):
    edited(folder / "config.json", **changes)
    refused(lambda: load_pretrained_model(str(folder), None, device="cpu"))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("data", [b"", b"[]", b"{", "{}".encode("utf-16"), b"\xef\xbb\xbf{}"], ids=repr)
def test_every_file_of_a_checkpoint_is_read_by_the_one_reader(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    refused(lambda: read_settings(tmp_path / name), name)


# -- tokenizer, pictures, adapter, index -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, data",
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", json.dumps({"version": "1.0", "model": {"type": "BPE", "vocab": 3}}).encode()),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"model_max_length": "long"}'),
        ("tokenizer_config.json", b'{"bos_token": 3}'),
        ("tokenizer_config.json", b'{"bos_token": {"content": 3}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": []}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 3}}'),
        ("tokenizer_config.json", b'{"padding_side": "top"}'),
        ("tokenizer_config.json", b'{"tokenizer_class": 3}'),
        ("tokenizer_config.json", b'{"tokenizer_clas": "LlamaTokenizer"}'),
        ("special_tokens_map.json", b"[]"),
        ("special_tokens_map.json", b"{"),
        ("added_tokens.json", b"3"),
    ],
)
def test_a_damaged_tokenizer_is_one_line(folder, file, data):
    (folder / file).write_bytes(data)
    refused(lambda: load_tokenizer(folder), str(folder))


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"image_mean": [0.5]}, "image_mean is [0.5]; write a list of 3"),
        ({"image_mean": "clip"}, "image_mean is 'clip'"),
        ({"image_std": [0.2, 0.2, 0]}, "image_std, entry 3 is 0; write a number above 0"),
        ({"size": "big"}, "size is 'big'"),
        ({"size": {"shortest_edge": 0}}, "size"),
        ({"crop_size": -3}, "crop_size is -3"),
        ({"do_resize": "yes"}, "do_resize is 'yes'; write true or false"),
        ({"resample": 9}, "resample is 9"),
        ({"rescale_factor": float("inf")}, "rescale_factor is inf"),
        ({"image_meen": [0.5, 0.5, 0.5]}, "did you mean 'image_mean'?"),
    ],
)
def test_settings_of_the_image_processor_are_named(folder, changes, said):
    (folder / "preprocessor_config.json").write_text(json.dumps(changes))
    refused(lambda: CLIPVisionTower.read_processor(str(folder)), "preprocessor_config.json: ", said)


def test_an_image_processor_in_the_larger_file_alone_is_used(tmp_path):
    config = CLIPVisionConfig(image_size=32)
    own = {"image_mean": [0.1, 0.2, 0.3], "image_processor_type": "CLIPImageProcessor", "crop_size": 32, "size": 32}
    for values, mean in (({"image_processor": own}, 0.1), ({"processor_class": "LlavaProcessor"}, 0.48145466)):
        (tmp_path / "processor_config.json").write_text(json.dumps(values))
        assert CLIPVisionTower.shipped_processor(tmp_path, config).image_mean[0] == pytest.approx(mean)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {**own, "image_mean": [0.1]}}))
    refused(lambda: CLIPVisionTower.shipped_processor(tmp_path, config), "processor_config.json: image_processor: ")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"r": 0}, "r is 0; write an integer of 1 or more"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'"),
        ({"lora_dropout": 2}, "lora_dropout is 2"),
        ({"bias": "some"}, "bias is 'some'; known: none, all, lora_only"),
        ({"target_modules": 3}, "target_modules is 3"),
        ({"peft_type": 7}, "peft_type is 7"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path is ['a']"),
        ({"rank_pattern": []}, "rank_pattern is []"),
        ({"lora_alhpa": 16}, "did you mean 'lora_alpha'?"),
    ],
)
def test_an_adapters_config_is_named(tmp_path, changes, said):
    (tmp_path / "adapter_config.json").write_text(json.dumps(changes))
    refused(lambda: adapter_base(tmp_path, None), "adapter_config.json: ", said)


@pytest.mark.parametrize(
    "values, said",
    [
        ({"weight_map": ["model.norm.weight"]}, "weight_map is ['model.norm.weight']; write a JSON object"),
        ({"weight_map": {"model.norm.weight": 3}}, "weight_map: model.norm.weight is 3"),
        ({"weight_map": {"model.norm.weight": ""}}, "weight_map: model.norm.weight is ''"),
        ({"weight_maps": {"model.norm.weight": "a"}}, "did you mean 'weight_map'?"),
        ({"metadata": 3, "weight_map": {}}, "metadata is 3"),
        ({"weight_map": {"model.norm.weight": "absent.safetensors"}}, "absent.safetensors, which is not there"),
    ],
)
def test_an_index_is_named(folder, values, said):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(values))

    def read():
        assert weight_files(folder)
        return Checkpoint.open(folder).tensor_files

    refused(read, "model.safetensors.index.json", said)


# -- what the project writes itself ------------------------------------------------------------------------------------

SEQUENCE = {"name": "h", "tasks": [{"name": "abd", "train": "a.jsonl"}], "test": "t.jsonl", "image_folder": "img"}


@pytest.mark.parametrize(
    "name", [*SEQUENCE, "dataset", "answer_suffix", "licence", "slots_per_task", "metrics", "keys"]
)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_sequences_fields_have_types(tmp_path, name, wrong):
    text_is_right = wrong == "a text" and name not in ("tasks", "slots_per_task", "metrics", "keys")
    if not text_is_right:
        (tmp_path / "h.json").write_text(json.dumps({**SEQUENCE, name: WRONG[wrong]}))
        refused(lambda: load_sequence(tmp_path / "h.json", {}), "h.json: ")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"tasks": []}, "'tasks' is missing or empty"),
        ({"tasks": [{"name": "abd"}]}, "task 1 needs a name and a training file"),
        ({"tasks": [{"name": 1, "train": "a"}]}, "task 1: name is 1; write it in quotes"),
        ({"tasks": [{"name": "a/b", "train": "a"}]}, "task name 'a/b'"),
        ({"tasks": [{"name": "../x", "train": "a"}]}, "task name '../x'"),
        ({"tasks": [{"name": "abd", "train": [3]}]}, "train is [3]; write a file's name"),
        ({"tasks": [{"name": "abd", "train": "a", "rows": 3}]}, "unknown field 'rows'"),
        ({"name": "a/b"}, "name is 'a/b', which cannot name a folder"),
        ({"name": ".."}, "name is '..', which cannot name a folder"),
        ({"name": "x" * 300}, "a part of 300 bytes"),
        ({"name": "a\0b"}, "holds a control character"),
        ({"keys": {"tau": 0}}, "keys.tau is 0; write a number above 0"),
        ({"keys": {"tau": float("nan")}}, "keys.tau is nan"),
        ({"keys": {"image_weight": 2}}, "keys.image_weight is 2"),
        ({"keys": {"rank": 10**9}}, "keys.rank is 1000000000"),
        ({"train": {"epochs": -1}}, "train.epochs is -1; write a number above 0"),
        ({"train": {"learning_rate": float("inf")}}, "train.learning_rate is inf"),
        ({"train": {"adam_beta2": 2}}, "train.adam_beta2 is 2"),
        ({"train": {"seed": -4}}, "train.seed is -4"),
        ({"train": {"epoch": 3}}, "did you mean 'epochs'?"),
    ],
)
def test_a_sequences_values_are_named(tmp_path, changes, said):
    (tmp_path / "h.json").write_text(json.dumps({**SEQUENCE, **changes}))
    refused(lambda: load_sequence(tmp_path / "h.json", {}), "h.json: ", said)


@pytest.mark.parametrize(
    "variable, value",
    [("SLOTS_PER_TASK", "0"), ("SLOTS_PER_TASK", "²"), ("SLOTS_PER_TASK", "9" * 30), ("EPOCHS", "nan"), ("SEED", "-1")],
)
def test_the_environment_is_held_to_the_same(tmp_path, variable, value):
    (tmp_path / "h.json").write_text(json.dumps(SEQUENCE))
    refused(lambda: load_sequence(tmp_path / "h.json", {variable: value}), variable)


ZERO = json.loads((ROOT / "scripts" / "zero3.json").read_text())


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"gradient_clippin": 0.5}, "unknown setting 'gradient_clippin'; did you mean 'gradient_clipping'?"),
        ({"gradient_clipping": "0.5"}, "gradient_clipping is '0.5'; write a number"),
        ({"gradient_clipping": float("nan")}, "gradient_clipping is nan"),
        ({"train_batch_size": -1}, "train_batch_size is -1"),
        ({"train_micro_batch_size_per_gpu": 2.5}, "train_micro_batch_size_per_gpu is 2.5"),
        ({"fp16": 3}, "fp16 is 3; write a JSON object"),
        ({"fp16": {"enabled": True, "speed": 1}}, "speed is 1: Extra inputs are not permitted"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "cannot be simultaneously enabled"),
        ({"optimizer": "adam"}, "optimizer is 'adam'"),
        ({"optimizer": {"typ": "AdamW"}}, "did you mean 'type'?"),
        ({"scheduler": {}}, "field 'type' is missing"),
        ({"aio": 3}, "aio is 3"),
        ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown is 'yes'; write true or false"),
        ({"communication_data_type": "fp99"}, "DeepSpeed refuses it"),
        ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage is 7"),
        ({"zero_optimization": {"stage": "three"}}, "zero_optimization.stage is 'three'"),
    ],
)
def test_deepspeeds_settings_are_named(tmp_path, changes, said):
    (tmp_path / "zero3.json").write_text(json.dumps({**ZERO, **changes}))
    refused(lambda: check_deepspeed_config(tmp_path / "zero3.json"), "zero3.json: ", said)


@pytest.fixture(scope="module")
def slots(base, tmp_path_factory):
    stage = write_stage(tmp_path_factory.mktemp("stages") / "llava-tiny_abd_chest", base)
    return torch.load(stage / "slots.pth", weights_only=True)


@pytest.mark.parametrize(
    "place, value",
    [
        (("settings", "num_layers"), "2"),
        (("settings", "num_layers"), 0),
        (("settings", "rank"), 2.5),
        (("settings", "tau"), float("nan")),
        (("settings", "tau"), -1.0),
        (("settings", "features"), {"o_proj": 32}),
        (("settings", "features"), {"o_proj": (0, 32)}),
        (("settings", "features"), [1]),
        (("settings", "query_mode"), "touch"),
        (("settings", "encoder"), "base"),
        (("settings", "encoder"), {"dim": "32"}),
        (("settings",), None),
        (("settings",), [1]),
        (("base",), "path"),
        (("base", "path"), 3),
        (("prompt",), [1]),
        (("prompt",), {"conv_mode": 3}),
        (("adapter",), 3),
        (("keys",), [1.0]),
        (("keys",), torch.zeros(3)),
        (("tasks",), {"abd": 1}),
        (("tasks",), [3]),
        (("tasks", 0, "name"), "../abd"),
        (("tasks", 0, "name"), 3),
        (("tasks", 0, "name"), "chest"),
        (("tasks", 0, "start"), -1),
        (("tasks", 0, "start"), "0"),
        (("tasks", 0, "stop"), 2**40),
        (("tasks", 0, "stop"), 5),
        (("tasks", 0, "trained"), "yes"),
        (("tasks", 0, "info"), 3),
        (("tasks", 0, "held_out"), {"text": 3}),
        (("tasks", 0, "statistics"), {"count": -1}),
        (("tasks", 0, "statistics"), {"count": 3, "total": torch.zeros(4), "scatter": torch.zeros(3, 3)}),
        (("tasks", 0, "extent"), extent(variances=torch.ones(3))),
        (("tasks", 0, "extent"), extent(rest=torch.ones(1))),
        (("tasks", 0, "extent"), {"mean": 3}),
        (("offsets",), [1]),
        (("offsets",), {"lung": {"A": {}, "B": {}}}),
        (("offsets", "abd"), 3),
        (("offsets", "abd", "A"), torch.zeros(2)),
        (("offsets", "abd", "A"), {"o_proj": torch.zeros(2)}),
        (("version",), "1"),
        (("checksum",), 1),
        (("settings", "offset_scope"), "nowhere"),
        (("settings", "encoder"), {"files": 3}),
        (("base", "files"), ["model.safetensors"]),
        (("setings",), {}),
    ],
    ids=str,
)
def test_a_slot_files_fields_are_named(slots, tmp_path, place, value):
    data = copy.deepcopy(slots)
    for part in (data, *data["tasks"]):
        del part["checksum"]  # else that alone would refuse it
    inner = data
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    if place == ("setings",):
        del data["settings"]
    torch.save(data, tmp_path / "slots.pth")
    refused(lambda: Pool.read(tmp_path / "slots.pth"), "slots.pth")


@pytest.mark.parametrize(
    "values",
    [{"record": "2"}, {"method": 3}, {"task": ["abd"]}, {"prompt": [1]}, {"slots": 3}, {"earlier_tasks": "abd"}],
)
def test_a_runs_record_is_named(tmp_path, values):
    (tmp_path / "training.json").write_text(json.dumps(values))
    refused(lambda: read_record(tmp_path / "training.json"), "training.json: the run's record is damaged")


FINGERPRINT = {"path": "a", "sha256": "0"}
FIGURE = {"value": 0.5, "ci95": [0.4, 0.6], "n": 4, "formula": "mean"}
SCORES = {
    "format_version": 1,
    "model_id": "llava-x",
    "groups": {"overall": {"rows": 4, "figures": {"exact_match": FIGURE}}},
    "rows_file": "rows.jsonl",
    "provenance": {
        "question_file": FINGERPRINT,
        "answers_file": FINGERPRINT,
        "package": {},
        "tokenizer": "plain",
        "unanswered_questions": 0,
    },
}


def write_scores(folder, scores, row='{"scores": {"exact_match": 1.0}, "domain": "abd"}'):
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "rows.jsonl").write_text(f"{row}\n")
    return folder / "scores.json"


@pytest.mark.parametrize(
    "place, value",
    [
        (("groups",), [1]),
        (("groups", "overall"), 3),
        (("groups", "overall", "rows"), "4"),
        (("groups", "overall", "figures"), None),
        (("groups", "overall", "figures", "exact_match"), 0.5),
        (("groups", "overall", "figures", "exact_match", "value"), "high"),
        (("groups", "overall", "figures", "exact_match"), {"n": 1, "formula": "mean"}),
        (("groups", "overall", "figures", "exact_match", "ci95"), [1]),
        (("groups", "overall", "figures", "exact_match", "n"), -1),
        (("provenance",), []),
        (("provenance", "question_file"), "a.jsonl"),
        (("provenance", "unanswered_questions"), None),
        (("model_id",), None),
        (("rows_file",), 3),
        (("rows_file",), "../rows.jsonl"),
        (("rows_file",), "/etc/passwd"),
    ],
    ids=str,
)
def test_a_scores_file_is_named(tmp_path, place, value):
    read_scores(write_scores(tmp_path, SCORES))
    scores = copy.deepcopy(SCORES)
    inner = scores
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    refused(lambda: read_scores(write_scores(tmp_path, scores)), "scores.json")


@pytest.mark.parametrize(
    "row", ["3", "null", "{}", '{"scores": 3}', '{"scores": {"a": "b"}}', '{"scores": {}, "domain": 3}', "{"]
)
def test_rows_of_scores_are_named(tmp_path, row):
    refused(lambda: read_scores(write_scores(tmp_path, SCORES, row)), "rows.jsonl line 1")


def test_scores_that_are_not_what_was_written_are_named(tmp_path):
    whole = {**SCORES, "rows_sha256": file_sha256(write_scores(tmp_path, SCORES).with_name("rows.jsonl"))}
    whole = {**whole, "checksum": values_sha256(whole)}
    read_scores(write_scores(tmp_path, whole))
    other = '{"scores": {"exact_match": 0.0}, "domain": "abd"}'
    refused(lambda: read_scores(write_scores(tmp_path, whole, other)), "rows.jsonl: is not what was written beside")
    refused(lambda: read_scores(write_scores(tmp_path, {**whole, "model_id": "b"})), "scores.json: is not what was")
    refused(lambda: read_scores(write_scores(tmp_path, {**whole, "checksum": 1})), "scores.json: checksum is 1")
    lacking = {**SCORES, "checksum": values_sha256(SCORES)}
    refused(lambda: read_scores(write_scores(tmp_path, lacking)), "rows.jsonl: is not what was written beside")
