"""LLaVA's stages against what is outside of them: transformers' own LLaVA, a killed run, LLaVA v1.5's command lines."""

import json
import shlex

import pytest
import torch
from hf_llava import TOKENS, write_hf_model
from safetensors.torch import load_file
from tiny_parts import stage_words, write_parts
from tiny_world import arguments
from transformers import LlavaForConditionalGeneration

from llava.checkpoints.weights import load_bin
from llava.constants import IGNORE_INDEX
from llava.model.builder import load_pretrained_model
from llava.train import llava_trainer
from llava.train.train import train


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


# -- transformers' own model -------------------------------------------------------------------------------------------


def theirs(batch, image_token):
    """A batch of ours as transformers wants it: one placeholder a feature."""
    rows = []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"]):
        place = (ids == -200).nonzero().item()
        features, nothing = torch.full((TOKENS,), image_token), torch.full((TOKENS,), IGNORE_INDEX)
        rows.append(
            [
                torch.cat([own[:place], filled, own[place + 1 :]])
                for own, filled in ((ids, features), (labels, nothing), (mask.long(), torch.ones_like(features)))
            ]
        )
    ids, labels, mask = (torch.stack(column) for column in zip(*rows))
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "pixel_values": batch["images"]}


def test_the_loss_falls_as_that_of_transformers_own_llava(parts, tmp_path, monkeypatch):
    """Ten steps on one batch with the same optimizer, from the same weights."""
    write_hf_model(tmp_path / "llava-hf")
    rows = json.loads((parts / "align.json").read_text())[:4]
    (parts / "four.json").write_text(json.dumps(rows), encoding="utf-8")
    batches, losses = [], []
    compute = llava_trainer.LLaVATrainer.compute_loss

    def note(self, model, inputs, *args, **kwargs):
        batches.append({name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        loss = compute(self, model, inputs, *args, **kwargs)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(llava_trainer.LLaVATrainer, "compute_loss", note)
    words = stage_words(parts, tmp_path / "llava-ours", "four.json", "--version", "v1", "--max_steps", 10)
    place = words.index("--vision_tower")
    del words[place : place + 2]
    more = ["--model_name_or_path", tmp_path / "llava-hf", "--lr_scheduler_type", "constant", "--feature_cache_mb", 0]
    with arguments([*words, *more]):
        train()

    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava-hf").train()
    model.model.vision_tower.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    expected = []
    for batch in batches:
        loss = model(**theirs(batch, model.config.image_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert len(losses) == 10 and losses[-1] < 0.9 * losses[0]
    assert losses == pytest.approx(expected, abs=1e-4)
    trained_here = load_pretrained_model(str(tmp_path / "llava-ours"), None, device="cpu")[1]  # in LLaVA's own layout
    assert torch.allclose(trained_here.lm_head.weight, model.lm_head.weight, atol=1e-4)


# -- a killed run ------------------------------------------------------------------------------------------------------


def weights(stage):
    found = {}
    for file in sorted(stage.glob("*.safetensors")):
        found |= load_file(file)
    for file in sorted(stage.glob("*.bin")):
        found |= load_bin(file)
    return found


@pytest.mark.parametrize(
    "flags, data",
    [
        ("--version plain --tune_mm_mlp_adapter True", "align.json"),
        ("--version v1 --group_by_modality_length True --mm_projector_lr 1e-4", "instruct.json"),
        ("--version v1 --lora_enable True --lora_r 2 --lora_dropout 0.1", "instruct.json"),
    ],
)
def test_a_killed_run_ends_as_an_undisturbed_one(parts, tmp_path, monkeypatch, flags, data, capsys):
    more = (*flags.split(), "--save_strategy", "steps", "--save_steps", 1, "--max_steps", 6)
    with arguments(stage_words(parts, tmp_path / "a" / "llava-stage", data, *more)):
        train()
    save = llava_trainer.LLaVATrainer._save_checkpoint

    def stop_after_four(self, model, trial):
        save(self, model, trial)
        if self.state.global_step == 4:
            raise KeyboardInterrupt

    words = stage_words(parts, tmp_path / "b" / "llava-stage", data, *more)
    with monkeypatch.context() as killed, arguments(words), pytest.raises(KeyboardInterrupt):
        killed.setattr(llava_trainer.LLaVATrainer, "_save_checkpoint", stop_after_four)
        train()
    with arguments(words):
        train()
    assert "checkpoint-4" in capsys.readouterr().out
    one, other = weights(tmp_path / "a" / "llava-stage"), weights(tmp_path / "b" / "llava-stage")
    assert one.keys() == other.keys() and one
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# -- LLaVA v1.5's own command lines ------------------------------------------------------------------------------------

COMMON = """--vision_tower {clip} --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False
    --mm_use_im_patch_token False --bf16 True --num_train_epochs 1 --per_device_eval_batch_size 4
    --gradient_accumulation_steps 1 --evaluation_strategy "no" --save_strategy "steps" --save_total_limit 1
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1 --tf32 True
    --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True
    --report_to wandb --image_folder {images} --version {version} --data_path {data} --model_name_or_path {model}
    --output_dir {checkpoints}/{name} --per_device_train_batch_size {batch}"""
TUNED = "--image_aspect_ratio pad --group_by_modality_length True --save_steps 50000"
TRAINED = "--pretrain_mm_mlp_adapter {checkpoints}/llava-v1.5-13b-pretrain/mm_projector.bin"
LORA = "--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 --learning_rate 2e-4"
COMMANDS = [
    ("llava-v1.5-13b-pretrain", "plain", "align.json", "vicuna", 32, "--tune_mm_mlp_adapter True --save_steps 24000 "
     "--learning_rate 1e-3", {"mm_projector.bin"}),
    ("llava-v1.5-13b", "v1", "instruct.json", "vicuna", 16, f"{TUNED} {TRAINED} --learning_rate 2e-5",
     {"model.safetensors", "preprocessor_config.json"}),
    ("llava-v1.5-13b-lora", "v1", "instruct.json", "vicuna", 16, f"{TUNED} {TRAINED} {LORA}",
     {"adapter_model.safetensors", "adapter_config.json", "non_lora_trainables.bin"}),
    ("llava-v1.5-13b-task", "v1", "instruct.json", "llava-v1.5-13b", 16, f"{TUNED} --learning_rate 2e-5",
     {"model.safetensors"}),
    ("llava-v1.5-13b-task-lora", "v1", "instruct.json", "llava-v1.5-13b", 16, f"{TUNED} {LORA}",
     {"adapter_model.safetensors", "non_lora_trainables.bin"}),
]  # fmt: skip


def test_llavas_own_command_lines_run_as_they_are(parts, tmp_path, capsys):
    """All flags of pretrain.sh, finetune.sh, finetune_lora.sh, finetune_task.sh and finetune_task_lora.sh; only the
    paths are others."""
    for name, version, data, model, batch, more, files in COMMANDS:
        places = {"clip": parts / "clip", "images": parts / "images", "version": version, "data": parts / data}
        places |= {"model": parts / model if model == "vicuna" else tmp_path / model, "checkpoints": tmp_path}
        line = f"{COMMON} {more}".format(**places, name=name, batch=batch)
        with arguments(shlex.split(line)):
            train()
        written = {file.name for file in (tmp_path / name).iterdir()}
        assert files | {"config.json", "tokenizer.json"} <= written, name
    said = capsys.readouterr().out
    assert "ignored" not in said
    if not torch.cuda.is_available():
        assert "--tf32 True is left out" in said and "--bf16 True" in said
