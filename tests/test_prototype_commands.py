"""The public prototype's command lines as they stand in its scripts, end to end on the tiny world.

Places, the base and the sequence are this test's; on a machine without a GPU ``--use_cpu True`` is added, and DeepSpeed
is left to the slow test. Everything else is as in ``scripts/v1_5/finetune_continual.sh``, ``scripts/v1_5/eval/
cv805.sh`` and ``llava/train/train_prompt_key.py`` of the prototype: order of tasks, chaining, chunks and names.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from tiny_world import RANK, TOP_K, arguments, make_world, run_main, same_slots
from warm_python import warm_python

import merge_prompt_key
import train_prompt_key
from llava.data.rows import read_rows
from llava.eval import eval_video_qa, model_vqa_loader
from llava.slots.pool import Pool
from llava.train.train import train

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("chest", "abd", "head")

KEYS = """-g 8 --epochs 3 --lr_step_size 1 --log_interval 50 --lr 1e-3 --batch_size 128 --num_workers 4
--master_port 8889 --local-rank -1"""

TRAIN = """--version v1 --vision_tower output/clip-vit-large-patch14-336 --mm_projector_type mlp2x_gelu
--mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad
--group_by_modality_length True --bf16 True --num_train_epochs 1 --per_device_train_batch_size 4
--per_device_eval_batch_size 4 --gradient_accumulation_steps 1 --evaluation_strategy no --save_strategy steps
--save_steps 50000 --save_total_limit 1 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03
--lr_scheduler_type cosine --logging_steps 1 --tf32 False --model_max_length 2048 --gradient_checkpointing True
--dataloader_num_workers 4 --lazy_preprocess True --disable_task_id False --report_to wandb"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny base that names its tower as LLaVA-1.5 does, the three organs' rows, the task sequence and merged keys."""
    world = make_world(tmp_path_factory.mktemp("prototype"), ("abd", "chest", "head"))
    config = json.loads((world.base / "config.json").read_text())
    config["mm_vision_tower"] = "openai/clip-vit-large-patch14-336"
    (world.base / "config.json").write_text(json.dumps(config))
    return world


def train_keys(world, folder):
    """The README's step 1 with every flag of the command, and step 2."""
    for task in TASKS:
        words = ["--task", task, "--data_paths", world.folder / f"train_{task}.jsonl"]
        words += ["--save_path", folder / f"{task}.pth", *KEYS.split(), "--image_aspect_ratio", "pad"]
        own = ["--sequence", world.sequence, "--model_base", world.base, "--text_encoder", "base", "--cache_dir", ""]
        run_main(train_prompt_key.main, *words, *own, "--top_k", TOP_K, "--rank", RANK)
    merged = folder / "chest_abd_head.pth"
    files = [folder / f"{task}.pth" for task in TASKS]
    run_main(merge_prompt_key.main, *files, "--save_path", merged, "--sequence", world.sequence)
    return merged


def train_line(world, task, model, output, keys, *more):
    """One round of the loop of ``finetune_continual.sh``."""
    words = ["--model_name_or_path", model, "--data_path", world.folder / f"train_{task}.jsonl"]
    words += ["--cl_data_clss", task, "--image_folder", world.folder / "images", "--output_dir", output]
    words += [*TRAIN.split(), "--dataset_type", world.sequence, "--retriever_state_dict", keys]
    return [*words, "--use_cpu", "True", "--query_cache", "", *more]


def test_a_round_of_the_training_loop(place, tmp_path, capsys):
    """The second task over the first, by all flags of the script."""
    place.train("chest", tmp_path / "llava_vqa-rad2_chest", None, "--image_aspect_ratio", "pad")
    line = train_line(
        place, "abd", tmp_path / "llava_vqa-rad2_chest", tmp_path / "llava_vqa-rad2_chest_abd", place.keys
    )
    with arguments([*line, "--dataloader_num_workers", "0"]):
        train()
    assert Pool.read(tmp_path / "llava_vqa-rad2_chest_abd" / "slots.pth").names == ["abd", "chest"]
    out = capsys.readouterr().out
    assert "is a stage: it is the stage before" in out
    assert "note: --disable_task_id is accepted and ignored: a task trains its own slots" in out


@pytest.mark.slow
def test_the_prototypes_scripts_end_to_end(place, tmp_path, capsys):
    keys = train_keys(place, tmp_path / "prompt-key")
    assert Pool.read(keys).names == ["abd", "chest", "head"]
    model, name, stages = place.base, "llava_vqa-rad2", []
    for task in TASKS:
        name = f"{name}_{task}"
        with arguments(train_line(place, task, model, tmp_path / name, keys)):
            train()
        model = tmp_path / name
        stages.append(model)
    slots = Pool.read(model / "slots.pth")
    assert slots.names == ["abd", "chest", "head"] and all(task.trained for task in slots.tasks)
    earlier = Pool.read(stages[0] / "slots.pth").task("chest")
    assert same_slots(earlier, slots.task("chest"))  # nothing was forgotten on the way

    scores = evaluate(place, model, tmp_path / "eval" / f"my_continual_eval_{model.name}")
    assert list(scores) == ["overall", "abd", "chest", "head"]
    assert {"Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr"} <= scores["chest"].keys()
    out = capsys.readouterr().out
    for flag in ("--gpus", "--lr_step_size", "--disable_task_id"):
        assert f"note: {flag} is accepted and ignored:" in out


def evaluate(world, model, folder):
    """``cv805.sh``: chunks one after the other, their files put together, the scores."""
    folder.mkdir(parents=True)
    test, chunks = world.folder / "test.jsonl", 3
    for number in range(chunks):
        words = ["--model-path", model, "--question-file", test, "--image-folder", world.folder / "images"]
        words += ["--answers-file", folder / f"{chunks}_{number}.jsonl", "--num-chunks", chunks, "--chunk-idx", number]
        words += ["--temperature", 0, "--conv-mode", "vicuna_v1"]
        model_vqa_loader.main([*map(str, words), "--device", "cpu", "--max_new_tokens", "4"])
    merged = folder / "merged_predictions.jsonl"
    merged.write_bytes(b"".join((folder / f"{chunks}_{n}.jsonl").read_bytes() for n in range(chunks)))
    assert len(merged.read_text().splitlines()) == len(read_rows(test))
    words = ["--pred-path", merged, "--gt-file", test, "--output-json", folder / "nlp_metrics_scores.json"]
    eval_video_qa.main([*map(str, words), "--draws", "20"])
    return json.loads((folder / "nlp_metrics_scores.json").read_text())


@pytest.mark.slow
def test_the_prototypes_chain_under_deepspeed(place, tmp_path):
    """``deepspeed llava/train/train_mem.py --deepspeed ./scripts/zero3.json``: the second task over the first."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    model = place.base
    for number, task in enumerate(("chest", "abd")):
        words = train_line(place, task, model, tmp_path / f"llava-{number}", place.keys, "--deepspeed")
        command = [warm_python(), "llava/train/train_mem.py", *words, "./scripts/zero3.json", "--max_steps", 1]
        done = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        model = tmp_path / f"llava-{number}"
    assert Pool.read(model / "slots.pth").names == ["abd", "chest"]


# -- the page ----------------------------------------------------------------------------------------------------------

OWN = {
    "train_prompt_key": """gpus epochs lr_step_size log_interval lr batch_size num_workers save_path checkpoint task
    config_path data_paths master_port local_rank""",
    "train_mem": "cl_data_clss retriever_state_dict disable_task_id dataset_type preprare_retreival_version",
    "model_vqa_loader": """model_path model_base image_folder question_file answers_file conv_mode num_chunks chunk_idx
    temperature top_p num_beams max_new_tokens""",
    "eval_video_qa": "pred_path gt_file output_json",
}


@pytest.mark.parametrize("command", OWN)
def test_the_page_tells_every_flag(command):
    """All flags that the prototype's parsers declare beside LLaVA's, and all that its training script passes."""
    page = (ROOT / "docs" / "prototype.md").read_text(encoding="utf-8")
    told = {name.replace("-", "_") for name in re.findall(r"`--([\w-]+)`", page)}
    passed = re.findall(r"--(\w+)", TRAIN) if command == "train_mem" else []
    assert {*OWN[command].split(), *passed} <= told
