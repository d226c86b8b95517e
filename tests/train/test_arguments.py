"""Stage 2's command line and DeepSpeed's file: translated, checked and refused before anything is loaded."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_world import refusal

from llava.train.arguments import early_arguments, parse_arguments
from llava.train.deepspeed_config import check_agreement, check_deepspeed_config
from llava.utils import UserError

ROOT = Path(__file__).resolve().parents[2]

# -- arguments ---------------------------------------------------------------------------------------------------------


ENOUGH = "--task abd --model_name_or_path base --use_cpu True"


def parsed(words):
    """All groups of a command line that has what a run needs, as one dictionary."""
    groups = parse_arguments([*ENOUGH.split(), *words.split()])
    return {name: value for group in groups for name, value in vars(group).items()}


@pytest.mark.parametrize(
    "words, name, value",
    [
        ("--evaluation_strategy epoch --eval_data_path x", "eval_strategy", "epoch"),
        ("--evaluation_strategy no", "eval_strategy", "no"),
        ("--warmup_ratio 0.03", "warmup_steps", 0.03),
        ("--warmup-ratio=0.03", "warmup_steps", 0.03),
        ("--cl_data_clss chest", "task", "chest"),
        ("--dataset_type slake --task ct", "sequence", "slake"),
        ("--no_cuda", "use_cpu", True),
        ("--vision_tower openai/clip --seed 1", "vision_tower", "openai/clip"),
        ("--save_safetensors --overwrite_output_dir --seed 1", "seed", 1),
        ("--mm_vision_select_layer -2 --seed 1", "mm_vision_select_layer", -2),
        ("--mm_use_im_start_end False", "mm_use_im_start_end", False),
        ("--tune_mm_mlp_adapter True", "tune_mm_mlp_adapter", True),
        ("--freeze-backbone", "freeze_backbone", True),
        ("--group_by_modality_length True", "group_by_modality_length", True),
        ("--mm_projector_lr 2e-5", "mm_projector_lr", 2e-5),
        ("--model-max-length 99", "model_max_length", 99),
        ("--save_full_model", "save_full_model", True),
        ("--save_full_model False", "save_full_model", False),
    ],
)
def test_flags_of_other_versions_and_spellings_are_taken(words, name, value):
    assert parsed(words)[name] == value


def test_ignored_flags_are_said(capsys):
    parsed("--disable_task_id True --save_safetensors --logging-dir y")
    out = capsys.readouterr().out
    assert "--disable_task_id is accepted and ignored: a task trains its own slots" in out
    assert "--save_safetensors is accepted and ignored: it has no effect here" in out and "--logging_dir is" in out
    assert out.count("note:") == 3


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("llava.train.trackers.get_available_reporting_integrations", lambda: ["tensorboard"])
    assert parsed("--report_to tensorboard")["report_to"] == ["tensorboard"]
    with pytest.raises(UserError, match="--report_to wandb: not installed; pip install wandb, or give --report_to non"):
        parsed("--report_to wandb")
    with pytest.raises(UserError, match="--report_to tensorbord is no tracker; did you mean 'tensorboard'"):
        parsed("--report_to tensorbord")
    with pytest.raises(UserError, match="--report_to None is no tracker; did you mean 'none'"):
        parsed("--report_to None")


def test_several_trackers_are_named_with_commas(monkeypatch):
    monkeypatch.setattr("llava.train.trackers.get_available_reporting_integrations", lambda: ["tensorboard", "mlflow"])
    assert parsed("--report_to tensorboard,mlflow,tensorboard")["report_to"] == ["tensorboard", "mlflow"]
    assert parsed("--lazy_preprocess True --report_to tensorboard,wandb")["report_to"] == ["tensorboard"]
    with pytest.raises(UserError, match="--report_to wandb: not installed"):
        parsed("--report_to tensorboard,wandb")
    with pytest.raises(UserError, match="--report_to none,mlflow: 'none' stands alone"):
        parsed("--report_to none,mlflow")


def test_published_command_lines_run_without_their_tracker(monkeypatch, capsys):
    """Every script of LLaVA's and the prototype's reports to wandb."""
    monkeypatch.setattr("llava.train.trackers.get_available_reporting_integrations", lambda: [])
    assert parsed("--lazy_preprocess True --report_to wandb")["report_to"] == []
    assert "note: --report_to wandb is left out: wandb is not installed" in capsys.readouterr().out
    with pytest.raises(UserError, match="--report_to mlflow: not installed"):
        parsed("--lazy_preprocess True --report_to mlflow")
    monkeypatch.setattr("llava.train.trackers.get_available_reporting_integrations", lambda: ["wandb"])
    assert parsed("--lazy-preprocess True --report_to wandb")["report_to"] == ["wandb"]
    assert "left out" not in capsys.readouterr().out


@dataclass
class Options:
    """Options of a method; one of them is a flag that is ignored elsewhere."""

    strength: float = 0.5
    disable_task_id: str | None = None


def test_a_methods_options_are_flags_too(capsys):
    *_, options = parse_arguments([*ENOUGH.split(), "--strength", "2", "--disable-task-id", "clip"], Options)
    assert options == Options(2.0, "clip")
    assert "ignored" not in capsys.readouterr().out


def test_folders_follow_from_sequence_task_and_method(monkeypatch):
    monkeypatch.setenv("OUTPUT_DIR", "out")
    found = parsed("--cl_data_clss head --method joint")
    assert found["output_dir"] == "out/llava-vqa-rad-joint_abd_chest_head"
    assert found["previous_stage"] == "out/llava-vqa-rad-joint_abd_chest"
    assert found["retriever_state_dict"] == "out/prompt-key/merged_prompt_key.pth"
    assert parsed("--sequence phantom")["retriever_state_dict"] == "out/prompt-key/phantom/merged_prompt_key.pth"
    assert parsed("")["previous_stage"] is None
    given = parsed("--task head --output_dir llava-x")
    assert given["output_dir"] == "llava-x" and given["previous_stage"] is None


def test_the_sequence_the_environment_and_flags_in_that_order(tmp_path, monkeypatch):
    values = {"name": "m", "tasks": [{"name": "abd", "train": "x"}], "test": "t", "image_folder": "i"}
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(values))
    full = tmp_path / "full.json"
    full.write_text(json.dumps({**values, "train": {"epochs": 7, "batch_size": 3}, "base": {"model": "b"}}))
    for name in ("EPOCHS", "BATCH_SIZE", "SCHEDULER", "BASE_MODEL"):
        monkeypatch.delenv(name, raising=False)
    assert parsed(f"--sequence {bare}")["lr_scheduler_type"] == "linear"  # LLaVA's defaults where nothing is said
    assert parsed(f"--sequence {full}")["num_train_epochs"] == 7
    assert parse_arguments(f"--task abd --sequence {full} --use_cpu True".split())[0].model_name_or_path == "b"
    monkeypatch.setenv("EPOCHS", "5")
    monkeypatch.setenv("SCHEDULER", "cosine")
    found = parsed(f"--sequence {full}")
    assert (found["num_train_epochs"], found["per_device_train_batch_size"]) == (5, 3)
    assert found["lr_scheduler_type"] == "cosine"
    assert parsed(f"--sequence {full} --num-train-epochs 2")["num_train_epochs"] == 2


def test_what_must_be_known_early():
    found = early_arguments("--task abd --deepspeed=x.json --learning_rate 1 --dataset-type slake --colour red".split())
    assert (found.deepspeed, found.sequence, found.task, found.method) == ("x.json", "slake", "abd", "retrieval")
    assert early_arguments([]).deepspeed is None


def test_a_published_command_line_parses(tmp_path):
    line = f"""--model_name_or_path liuhaotian/llava-v1.5-7b --version v1 --data_path data/train_abd.jsonl
        --image_folder data/images --vision_tower openai/clip-vit-large-patch14-336 --mm_projector_type mlp2x_gelu
        --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad
        --group_by_modality_length True --output_dir {tmp_path}/llava-x --num_train_epochs 1
        --per_device_train_batch_size 16 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1
        --evaluation_strategy no --save_strategy steps --save_steps 50000 --save_total_limit 1 --learning_rate 2e-5
        --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --model_max_length 2048
        --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True --report_to none
        --task abd --local_rank=0 --use_cpu True"""
    model_args, data_args, training_args = parse_arguments(line.split())
    assert model_args.version == "v1" and data_args.image_aspect_ratio == "pad" and data_args.task == "abd"
    assert training_args.learning_rate == 2e-5 and training_args.warmup_steps == 0.03


@pytest.mark.parametrize(
    "words, message",
    [
        ("--task abd --output_dir llava-x --colour red", "unknown argument --colour"),
        ("--task abd --learning-rat 1", "unknown argument --learning-rat; did you mean --learning_rate?"),
        ("--output_dir llava-x --sequence vqa-rad", "no task given; add --task"),
        ("--output_dir llava-x --method joint", "no task given; add --task"),
        ("--task knee", "no --output_dir given"),
        (f"{ENOUGH} --eval_strategy epoch", "--eval_strategy epoch needs rows; add --eval_data_path"),
    ],
)
def test_incomplete_command_lines(words, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_arguments(words.split())


def test_a_wrong_value_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments("--task abd --learning_rate fast".split())
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert said.startswith("error: argument --learning_rate/--learning-rate: invalid float value: 'fast'")


# -- DeepSpeed's file --------------------------------------------------------------------------------------------------

INTEGER_KEYS = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)


@pytest.mark.parametrize("key", INTEGER_KEYS)
def test_a_fraction_is_refused_with_the_integer_to_write(tmp_path, key):
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, key: 0.9 * 256 * 256}}))
    with pytest.raises(UserError, match=f"zero3.json: zero_optimization.{key} is 58982.4, .* write 58982"):
        check_deepspeed_config(path)


def test_a_whole_float_is_only_noted(tmp_path, capsys):
    path = tmp_path / "zero3.json"
    path.write_text('{"zero_optimization": {"reduce_bucket_size": 5e8, "stage3_prefetch_bucket_size": "auto"}}')
    check_deepspeed_config(path)
    assert "reduce_bucket_size is 500000000.0; an integer is wanted, write 500000000" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            '"reduce_bucket_size": "5e8"',
            "reduce_bucket_size is 5e8, .* wants an integer; write 500000000$",
        ),
        (
            '"stage3_max_live_parameters": Infinity',
            "max_live_parameters is inf: Input should be a finite number",
        ),
        ('"reduce_buket_size": 5', "reduce_buket_size is no setting that DeepSpeed knows; take it out"),
        ('"overlap_comm": "perhaps"', "zero_optimization.overlap_comm is 'perhaps': Input should be a valid boolean"),
        ('"offload_param": {"device": "cpu", "buffer_count": 2.5}', "offload_param.buffer_count is 2.5, .* write 2$"),
        (
            '"stage3_gather_16bit_weights_on_model_save": true, "stage3_gather_fp16_weights_on_model_save": true',
            "stage3_gather_fp16_weights_on_model_save.* together; keep one of them",
        ),
    ],
)
def test_what_deepspeed_refuses_is_said_in_one_line(tmp_path, settings, message):
    path = tmp_path / "zero3.json"
    path.write_text(f'{{"zero_optimization": {{"stage": 3, {settings}}}}}')
    with pytest.raises(UserError, match=message) as caught:
        check_deepspeed_config(path)
    assert "\n" not in str(caught.value)


def test_another_encoding_is_named(tmp_path):
    path = tmp_path / "zero3.json"
    path.write_bytes("{}".encode("utf-16"))
    with pytest.raises(UserError, match="zero3.json: byte 0 is not UTF-8 text"):
        check_deepspeed_config(path)


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_the_shipped_files_pass_silently(name, capsys):
    check_deepspeed_config(ROOT / "scripts" / f"{name}.json")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "content, message",
    [
        ("{ oops", "line 1: broken JSON"),
        ("[]", "JSON object"),
        ("{}", "zero_optimization too"),
        ('{"zero_optimization": 3}', "JSON object"),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, message):
    (tmp_path / "zero3.json").write_text(content)
    with pytest.raises(UserError, match=f"zero3.json.*{message}"):
        check_deepspeed_config(tmp_path / "zero3.json")
    with pytest.raises(UserError, match="DeepSpeed settings not found: .*absent.json"):
        check_deepspeed_config(tmp_path / "absent.json")


def test_file_and_command_line_must_agree():
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    read = HfTrainerDeepSpeedConfig({"zero_optimization": {"stage": 3}, "gradient_clipping": 0.5, "bf16": "auto"})
    args = SimpleNamespace(deepspeed="zero3.json", hf_deepspeed_config=read)
    read.fill_match("bf16", False, "bf16")
    check_agreement(args)
    check_agreement(SimpleNamespace(deepspeed=None))
    read.fill_match("gradient_clipping", 1.0, "max_grad_norm")
    with pytest.raises(
        UserError, match="^zero3.json: gradient_clipping=0.5, but this run has max_grad_norm=1.0; write"
    ):
        check_agreement(args)


def test_it_is_looked_at_before_anything_is_loaded(world, capsys, tmp_path):
    path = tmp_path / "zero3.json"
    path.write_text('{"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 14745.6}}')
    words = ["--deepspeed", path, "--model_name_or_path", "./absent", "--task", "abd", "--output_dir", "llava-x"]
    assert "stage3_prefetch_bucket_size is 14745.6" in refusal(world, capsys, words)


def test_an_option_of_a_method_that_is_a_flag_already_is_named():
    @dataclass
    class Clash:
        learning_rate: float = 1.0

    with pytest.raises(UserError, match="'retrieval': its option 'learning_rate' is a flag of every training run"):
        parse_arguments(ENOUGH.split(), Clash)
