"""Stage 2: train one task's slots on a frozen base.

What happens, in order: the base is loaded and frozen; the merged keys give the task its slots; every training question
gets its text query once; transformers' trainer (on DeepSpeed, where asked for) fits the slots' offsets to the answers;
the stage checkpoint is written, with the slots of earlier tasks passed through untouched.

A killed run goes on from its last whole checkpoint when the same command is given again; a finished one is skipped.
"""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import torch
import transformers
from accelerate.utils import set_seed

from llava.checkpoints.weights import resolve_checkpoint
from llava.continual.methods import load_method
from llava.continual.queries import PictureSource, look_at_pictures, text_queries
from llava.continual.query_cache import QueryCache
from llava.continual.run import check_same_run, finished_stage, read_stage_slots, write_stage
from llava.continual.tasks import TaskSequence, load_sequence
from llava.data.prompt import Prompt, PromptEncoder
from llava.data.rows import Row, read_rows
from llava.data.samples import DataCollatorForSupervisedDataset, LazySupervisedDataset
from llava.devices import default_device, has_accelerator
from llava.files import atomic_write, file_sha256
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import attach_slots, attention, load_base
from llava.model.configs import llava_config
from llava.slots.encoders import encoder_from_identity
from llava.slots.file import SlotFile, read_slot_file
from llava.slots.fit import seed_of
from llava.slots.settings import RetrieverSettings
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, early_arguments, parse_arguments
from llava.train.deepspeed_config import check_agreement, check_deepspeed_config, prepare_cpu_deepspeed
from llava.train.llava_trainer import LLaVATrainer, last_complete_checkpoint, trainable_state
from llava.train.lora import add_lora, base_options, lora_settings, save_lora, slots_count_as_adapters
from llava.utils import UserError, rank0_print

RECORDED = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "bf16",
    "fp16",
    "model_max_length",
)


def train(attn_implementation: str | None = None) -> None:
    """Run stage 2 for the task that the command line names."""
    argv = sys.argv[1:]
    uses_deepspeed = _look_at_deepspeed(argv)
    model_args, data_args, args = parse_arguments(argv)
    check_agreement(args)
    model_args.attn_implementation = model_args.attn_implementation or attn_implementation
    transformers.logging.set_verbosity_error()
    sequence, method = load_sequence(data_args.sequence), load_method(args.method)
    base = resolve_checkpoint(model_args.model_name_or_path)
    stage = Path(args.output_dir)
    if "llava" not in stage.name.lower():
        raise UserError(f"--output_dir {stage}: the folder's name must contain 'llava'")
    previous = read_stage_slots(Path(args.previous_stage)) if args.previous_stage else None
    merged = read_slot_file(args.retriever_state_dict)
    files = [data_args.data_path] if data_args.data_path else method.training_files(sequence, data_args.task)
    rows = read_training_rows(files)
    held_out_rows = read_training_rows([data_args.eval_data_path]) if data_args.eval_data_path else None
    prompt = stage_prompt(model_args, data_args, args, sequence, base, merged.prompt)
    if previous is not None and (changed := prompt.difference(previous.prompt)):
        rank0_print(f"note: earlier tasks were trained with another prompt and will be asked with this one: {changed}")
    run = describe_run(model_args, data_args, sequence, args, merged, previous, files)
    if finished_stage(stage, run):
        rank0_print(f"{stage} is finished already; skipped")
        return
    work = stage.parent / "checkpoints" / stage.name
    check_same_run(work / "run.json", run, f"remove {work} to start the task anew, or restore the setting")
    args.output_dir = str(work)
    args.seed = seed_of(data_args.task, args.seed, "training") % 2**31  # a task's run does not depend on its place
    set_seed(args.seed)

    slots, trained_task = method.begin(merged, previous, data_args.task)
    model, tokenizer, image_processor = load_base(
        base, attn_implementation=attention(model_args.attn_implementation), **base_options(args, base_dtype(args))
    )
    model.requires_grad_(False)
    attach_slots(model, slots, base, with_encoder=False)
    prompt.tell(model.config)
    before = Path(args.previous_stage) if args.previous_stage else None
    lora = add_lora(model, args, before, str(model_args.model_name_or_path))
    parameters = model.retriever.train_only(trained_task)
    rank0_print(
        f"task {data_args.task}: {len(rows)} rows; {sum(p.numel() for p in parameters):,} weights in "
        f"{model.retriever.pool_size} slots train, the base is frozen"
    )
    image_folder = data_args.image_folder or sequence.image_folder
    encoder = PromptEncoder(prompt, tokenizer, image_processor, model.config, image_folder)
    source = picture_source(model, base, prompt, image_folder, args)
    dataset = build_dataset(rows, encoder, slots.settings, source, args)
    held_out = None if held_out_rows is None else build_dataset(held_out_rows, encoder, slots.settings, source, args)
    trainer = build_trainer(model, tokenizer, dataset, args, held_out)
    if args.should_save:
        with atomic_write(work / "run.json") as stream:
            json.dump(run, stream, indent=1)
    checkpoint = last_complete_checkpoint(work, args.world_size)
    if checkpoint:
        rank0_print(f"going on from {checkpoint}")
    result = trainer.train(resume_from_checkpoint=checkpoint)
    state = trainable_state(model)
    finite = all(torch.isfinite(tensor).all() for tensor in state.values())
    if not finite or not torch.isfinite(torch.tensor(result.training_loss)):
        raise UserError(f"the training loss is {result.training_loss}; lower --learning_rate, and remove {work}")
    trained = collect(slots, trained_task, state)
    if args.should_save:
        config = model.config
        vars(config).pop("quantization_config", None)  # says how this run held the base, not what the stage is
        config.base_model_name_or_path = str(model_args.model_name_or_path)
        whole = model if args.save_full_model and not uses_deepspeed else None
        adapter = None if lora is None else partial(save_lora, config=lora, state=state)
        log = trainer.state.log_history
        final = method.end(previous, trained)
        final.prompt = prompt.to_dict()
        write_stage(stage, final, config, tokenizer, run, log, whole, adapter)
        shutil.rmtree(work, ignore_errors=True)
    rank0_print(f"task {data_args.task}: training loss {result.training_loss:.4f}; written to {stage}")


def _look_at_deepspeed(argv: list[str]) -> bool:
    """Check DeepSpeed's file before anything is loaded, and set it up on a machine without a GPU."""
    settings = early_arguments(argv).deepspeed
    if settings is None:
        return False
    check_deepspeed_config(settings)
    if not has_accelerator():
        prepare_cpu_deepspeed()
    return True


def read_training_rows(files: list[str]) -> list[Row]:
    """The files' rows; each has an answer to each question."""
    return [row for file in files for row in read_rows(file, require_answer=True)]


def stage_prompt(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
    sequence: TaskSequence,
    base: Path,
    of_keys: dict,
) -> Prompt:
    """How this stage asks: the flags, else the pictures as the keys saw them, else what the base says.

    Args:
        of_keys: prompt of the merged keys; empty in files of older versions.

    Raises:
        UserError: an unknown template or picture mode, or one that the base cannot do.
    """
    prompt = Prompt.of(
        llava_config(base),
        get_model_name_from_path(str(model_args.model_name_or_path)),
        conv_mode=model_args.version,
        answer_suffix=sequence.answer_suffix,
        answer_style=sequence.answer_style,
        aspect_ratio=data_args.image_aspect_ratio or of_keys.get("aspect_ratio"),
        max_length=args.model_max_length,
    )
    if changed := prompt.difference({name: of_keys[name] for name in ("aspect_ratio",) if name in of_keys}):
        rank0_print(f"note: the keys were fitted to other pictures: {changed}; routes may suffer")
    return prompt


def base_dtype(args: TrainingArguments) -> torch.dtype:
    """Of the frozen base: half precision when training in it, float32 otherwise."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def describe_run(
    model_args: ModelArguments,
    data_args: DataArguments,
    sequence: TaskSequence,
    args: TrainingArguments,
    merged: SlotFile,
    previous: SlotFile | None,
    files: list[str],
) -> dict:
    """What makes two runs of a task the same; kept with the checkpoint and compared when the command is run again."""
    return {
        "task": data_args.task,
        "method": args.method,
        "seed": args.seed,
        "data": {Path(file).name: file_sha256(file)[:16] for file in files},
        "keys": file_sha256(args.retriever_state_dict)[:16],
        "base": merged.base.get("fingerprint"),
        "answer_style": sequence.answer_style,
        "version": model_args.version,
        "image_aspect_ratio": data_args.image_aspect_ratio,
        "earlier_tasks": {task.name: task.checksum() for task in previous.tasks} if previous else {},
        **{name: getattr(args, name) for name in RECORDED},
        **lora_settings(args),
    }


def build_dataset(
    rows: list[Row], encoder: PromptEncoder, settings: RetrieverSettings, source: PictureSource, args: TrainingArguments
) -> LazySupervisedDataset:
    """Training samples with their queries, and with the frozen tower's features where these fit the memory.

    The rows are checked before anything is computed of them; each picture is then looked at once.
    """
    dataset, cache = LazySupervisedDataset(rows, encoder), QueryCache(args.query_cache)
    texts = None
    if settings.uses_text and settings.encoder:
        texts = text_queries(
            rows, settings.encoder, lambda: encoder_from_identity(settings.encoder, source.base), cache
        )
    kind = settings.image_query if settings.uses_images else None
    images, features = look_at_pictures(rows, source, kind, cache, args.feature_cache_mb * 2**20)
    if features is None:
        rank0_print("note: the pictures' features exceed --feature_cache_mb; the tower runs every step")
    return dataset.add(texts, images, features)


def picture_source(model, base: Path, prompt: Prompt, image_folder: str, args: TrainingArguments) -> PictureSource:
    """The pictures as this stage sees them: by the model's own tower where it is whole, else by one of its own.

    Under ZeRO-3 the model's weights are in parts, and beside a quantised decoder they are where accelerate puts them.
    """
    device, dtype, tower = default_device(use_cpu=args.use_cpu), base_dtype(args), model.get_vision_tower()
    if args.bits < 16 or any(hasattr(weight, "ds_id") for weight in tower.parameters()):
        return PictureSource.standalone(base, image_folder, prompt.aspect_ratio, device, dtype)
    return PictureSource(base, model.config, image_folder, prompt.aspect_ratio, lambda: tower.to(device), device, dtype)


def build_trainer(model, tokenizer, dataset, args: TrainingArguments, held_out=None) -> LLaVATrainer:
    """The trainer, with what a frozen base asks for; ``held_out`` is a dataset for a validation loss."""
    if held_out is not None:
        args.prediction_loss_only = True  # logits of a whole file would fill the memory
        args.eval_strategy = "epoch" if args.eval_strategy == "no" else args.eval_strategy
    if args.gradient_checkpointing:
        args.gradient_checkpointing_kwargs = {"use_reentrant": False}  # slots are gathered: not leaves of the graph
    args.save_total_limit = max(args.save_total_limit or 2, 2)  # the newest may still be half-written
    args.logging_nan_inf_filter = False  # or a loss that is not a number would be logged, and pass, as one that is
    model.config.use_cache = False
    with slots_count_as_adapters(model):
        return LLaVATrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            eval_dataset=held_out,
            data_collator=DataCollatorForSupervisedDataset(tokenizer),
            processing_class=tokenizer,
        )


def collect(slots: SlotFile, task: str, state: dict[str, torch.Tensor]) -> SlotFile:
    """The slots after training, as a slot file: the trained task's offsets replaced, everything else as it was."""
    entry = slots.task(task)
    for kind in ("A", "B"):
        trained = {name.rsplit(".", 1)[1]: value for name, value in state.items() if f".{kind}." in name}
        setattr(entry, kind, trained)
    entry.trained = True
    return slots


def main() -> None:
    """Command line of stage 2."""
    train()
