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
from llava.continual.queries import compute_image_queries
from llava.continual.run import check_same_run, finished_stage, read_stage_slots, write_stage
from llava.continual.tasks import TaskSequence, load_sequence
from llava.conversation import conv_mode_for
from llava.data.rows import Row, in_lower_case, read_rows
from llava.data.samples import DataCollatorForSupervisedDataset, LazySupervisedDataset, check_image_files
from llava.devices import default_device, has_accelerator
from llava.files import atomic_write, file_sha256
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import attach_slots, attention, load_base
from llava.model.vision.features import tower_features
from llava.slots.encoders import encoder_from_identity
from llava.slots.file import SlotFile, read_slot_file
from llava.slots.fit import seed_of
from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments, parse_arguments, translate
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
    if not model_args.model_name_or_path:
        raise UserError("no base model; give --model_name_or_path")
    base = resolve_checkpoint(model_args.model_name_or_path)
    stage = Path(args.output_dir)
    if "llava" not in stage.name.lower():
        raise UserError(f"--output_dir {stage}: the folder's name must contain 'llava'")
    previous = read_stage_slots(Path(args.previous_stage)) if args.previous_stage else None
    merged = read_slot_file(args.retriever_state_dict)
    files = [data_args.data_path] if data_args.data_path else method.training_files(sequence, data_args.task)
    rows = read_training_rows(files, sequence)
    held_out_rows = read_training_rows([data_args.eval_data_path], sequence) if data_args.eval_data_path else None
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
    before = Path(args.previous_stage) if args.previous_stage else None
    lora = add_lora(model, args, before, str(model_args.model_name_or_path))
    parameters = model.retriever.train_only(trained_task)
    rank0_print(
        f"task {data_args.task}: {len(rows)} rows; {sum(p.numel() for p in parameters):,} weights in "
        f"{model.retriever.pool_size} slots train, the base is frozen"
    )
    dataset = build_dataset(rows, sequence, data_args, args, model_args, model, tokenizer, image_processor, slots, base)
    held_out = None
    if held_out_rows is not None:
        shared = (sequence, data_args, args, model_args, model, tokenizer, image_processor, slots, base)
        held_out = build_dataset(held_out_rows, *shared)
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
        write_stage(stage, method.end(previous, trained), config, tokenizer, run, log, whole, adapter)
        shutil.rmtree(work, ignore_errors=True)
    rank0_print(f"task {data_args.task}: training loss {result.training_loss:.4f}; written to {stage}")


def _look_at_deepspeed(argv: list[str]) -> bool:
    """Check DeepSpeed's file before anything is loaded, and set it up on a machine without a GPU."""
    clean = translate(argv)
    if "--deepspeed" not in clean:
        return False
    check_deepspeed_config(clean[clean.index("--deepspeed") + 1])
    if not has_accelerator():
        prepare_cpu_deepspeed()
    return True


def read_training_rows(files: list[str], sequence: TaskSequence) -> list[Row]:
    """The files' rows, with answers in the sequence's style."""
    rows = [row for file in files for row in read_rows(file, require_answer=True)]
    return [in_lower_case(row) for row in rows] if sequence.answer_style == "lower" else rows


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
    rows: list[Row], sequence: TaskSequence, data_args, args, model_args, model, tokenizer, image_processor, slots, base
) -> LazySupervisedDataset:
    """Training samples with their queries."""
    image_folder = data_args.image_folder or sequence.image_folder
    text_queries = image_queries = None
    if slots.settings.uses_text and slots.settings.encoder:
        encoder = encoder_from_identity(slots.settings.encoder, base)
        text_queries = encoder([row.question for row in rows])
    if slots.settings.uses_images:
        check_image_files(rows, image_folder)
        kind = slots.settings.image_query
        image_queries = compute_image_queries(
            rows, base, image_folder, kind, device=default_device(use_cpu=args.use_cpu)
        )
    if data_args.image_aspect_ratio:
        model.config.image_aspect_ratio = data_args.image_aspect_ratio
    name = get_model_name_from_path(str(model_args.model_name_or_path))
    return LazySupervisedDataset(
        rows,
        tokenizer,
        image_folder,
        image_processor,
        model.config,
        model_args.version or conv_mode_for(model.config, name),
        text_queries,
        image_queries=image_queries,
        answer_suffix=sequence.answer_suffix,
        features=picture_features(rows, base, image_folder, args),
        max_length=args.model_max_length,
    )


def picture_features(rows: list[Row], base: Path, image_folder: str, args: TrainingArguments):
    """The frozen tower's features of every picture, so that no epoch runs it again; ``None`` if they take too much."""
    names = list(dict.fromkeys(row.image for row in rows if row.image))
    check_image_files(rows, image_folder)
    found: dict[str, tuple[torch.Tensor, tuple[int, int]]] = {}
    device = default_device(use_cpu=args.use_cpu)
    features = tower_features(names, base, image_folder, 16, device, base_dtype(args), "picture features")
    for name, feature, _, size in features:
        found[name] = (feature.cpu().clone(), size)
        if len(found) * feature.nbytes > args.feature_cache_mb * 2**20:
            rank0_print(f"note: features of {len(names)} pictures exceed --feature_cache_mb; the tower runs every step")
            return None
    return found


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
