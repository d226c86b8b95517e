"""Train one stage: a recipe decides what is learned; this loop serves continual methods and LLaVA's own stages alike.

What happens, in order: everything that can be checked is; the base is loaded and frozen; the recipe attaches its
adapter and says what trains; transformers' trainer (on DeepSpeed, where asked for) takes the steps; the recipe writes
the stage, with the slots of earlier tasks passed through untouched.

A killed run goes on from its last whole checkpoint when the same command is given again; a finished one is skipped.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import set_seed

from llava.checkpoints.checkpoint import Checkpoint
from llava.checkpoints.manifest import content_of
from llava.continual.methods import METHODS, Context, Recipe
from llava.continual.model_card import write_stage_card
from llava.continual.preflight import tasks_of
from llava.continual.record import VERSION, checksums, deepspeed_record, defaults, first_version, settings_record
from llava.continual.run import Run
from llava.continual.sequence import TaskSequence, load_sequence
from llava.data.prompt import Prompt, PromptEncoder
from llava.data.rows import Row
from llava.data.samples import DataCollatorForSupervisedDataset, TrainingSamples, pictures_checksum
from llava.devices import has_accelerator
from llava.image_io import allow_pixels
from llava.inside import opened_to_links
from llava.model.configs import llava_config
from llava.model.partitioned import size_of
from llava.slots.fit import seed_of
from llava.slots.names import ALL
from llava.slots.pool import Pool
from llava.slots.settings import RetrieverSettings
from llava.train import align, instruct, naming  # noqa: F401 - they register LLaVA's own stages
from llava.train.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    early_arguments,
    parse_arguments,
)
from llava.train.base import asked_config, load_for_training
from llava.train.checkpoint_mark import last_complete_checkpoint
from llava.train.deepspeed_config import check_agreement, check_deepspeed_config, prepare_cpu_deepspeed
from llava.train.flags import check_flags, check_frozen_base
from llava.train.llava_trainer import LLaVATrainer
from llava.train.lora import add_lora, save_lora, slots_count_as_adapters, zero_stage
from llava.train.machine import free_compilations
from llava.train.memory import settle_checkpointing
from llava.train.preprocess import (
    LazySupervisedDataset,
    make_supervised_data_module,
    preprocess,
    preprocess_llama_2,
    preprocess_mpt,
    preprocess_multimodal,
    preprocess_plain,
    preprocess_v1,
    smart_tokenizer_and_embedding_resize,
)
from llava.train.stage_data import (
    base_dtype,
    build_dataset,
    keep_downloads_in,
    parts_record,
    picture_source,
    read_training_rows,
    share_prefixes,
    stage_prompt,
)
from llava.train.states import (
    all_finite,
    find_all_linear_names,
    get_mm_adapter_state_maybe_zero_3,
    get_peft_state_maybe_zero_3,
    get_peft_state_non_lora_maybe_zero_3,
    maybe_zero_3,
    safe_save_model_for_hf_trainer,
    save_whole_state,
    trainable_state,
    whole_state,
)
from llava.train.step_progress import show_steps
from llava.train.trackers import check_board, name_run
from llava.utils import UserError, rank0_print, run_cli

# Beside this module's own names those that LLaVA has here, which other trainers import.
__all__ = [
    "DataArguments",
    "DataCollatorForSupervisedDataset",
    "LLaVATrainer",
    "LazySupervisedDataset",
    "ModelArguments",
    "TrainingArguments",
    "find_all_linear_names",
    "get_mm_adapter_state_maybe_zero_3",
    "get_peft_state_maybe_zero_3",
    "get_peft_state_non_lora_maybe_zero_3",
    "make_supervised_data_module",
    "maybe_zero_3",
    "preprocess",
    "preprocess_llama_2",
    "preprocess_mpt",
    "preprocess_multimodal",
    "preprocess_plain",
    "preprocess_v1",
    "rank0_print",
    "safe_save_model_for_hf_trainer",
    "smart_tokenizer_and_embedding_resize",
    "train",
]


def train(attn_implementation: str | None = None) -> None:
    """Train the stage that the command line names."""
    argv = sys.argv[1:]
    early = early_arguments(argv)
    if early.deepspeed:
        look_at_deepspeed(early.deepspeed)
    if early.cache_dir:
        keep_downloads_in(early.cache_dir)
    recipe = METHODS.get(early.method)()
    model_args, data_args, args, options = parse_arguments(argv, recipe.Options, recipe.needs_keys)
    check_agreement(args)
    check_flags(model_args, data_args, args)
    model_args.attn_implementation = model_args.attn_implementation or attn_implementation
    transformers.logging.set_verbosity_error()
    context, prompt, rows = plan(recipe, model_args, data_args, args, options)
    run = context.run
    with run.held() if args.should_save else nullcontext():
        if run.finished():
            rank0_print(f"{run.folder} is finished already; skipped")
            if args.should_save:
                shutil.rmtree(run.work, ignore_errors=True)  # of a run that was killed while it cleared up
            return
        run.check_work()
        args.output_dir, args.seed = str(run.work), context.seed
        set_seed(args.seed)

        context.pool, context.trained = recipe.pool(context)
        if not recipe.trains:
            write_untrained(recipe, context, prompt, model_args, data_args, args)
            rank0_print(f"{title(context)}: nothing is trained; written to {run.folder}")
            return
        check_board(context)
        trainer = prepare(recipe, context, prompt, rows, model_args, data_args, args)
        if args.should_save:
            run.begin_work()
        checkpoint = last_complete_checkpoint(run.work, args.world_size)
        if checkpoint:
            rank0_print(f"going on from {checkpoint}")
        name_run(trainer, context, checkpoint)
        recipe.start(context, trainer.single_rows())
        result = trainer.train(resume_from_checkpoint=checkpoint)
        finish(recipe, context, trainer, result.training_loss, args)
        trainer.accelerator.wait_for_everyone()  # a process that leaves early would end the one that writes
        rank0_print(f"{title(context)}: training loss {result.training_loss:.4f}; written to {run.folder}")


def title(context: Context) -> str:
    """What the stage is called in messages."""
    return f"task {context.task}" if context.task else context.run.folder.name


def what_trains(recipe: Recipe, context: Context, parameters: list[torch.nn.Parameter]) -> str:
    """How many weights train, and what does not, in words."""
    count = sum(map(size_of, parameters))
    if recipe.needs_keys:
        return f"{count:,} weights in {context.pool.size} slots train, the base is frozen"
    return f"{count:,} of {sum(map(size_of, context.model.parameters())):,} weights train"


def look_at_deepspeed(path: str) -> None:
    """Check DeepSpeed's file before anything is loaded, and set it up on a machine without a GPU."""
    check_deepspeed_config(path)
    free_compilations()
    if not has_accelerator():
        prepare_cpu_deepspeed()


def plan(
    recipe: Recipe, model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments, options: Any
) -> tuple[Context, Prompt, list[Row]]:
    """Read and check everything but the base's weights: the stage, how its questions are asked, its rows."""
    allow_pixels(data_args.max_pixels)
    sequence = load_sequence(data_args.sequence) if recipe.needs_keys else no_sequence(recipe.name)
    base = Checkpoint.open(model_args.model_name_or_path)
    folder = Path(args.output_dir)
    if "llava" not in folder.name.lower():
        raise UserError(f"--output_dir {folder}: the folder's name must contain 'llava'")
    previous = Run.open(args.previous_stage) if args.previous_stage else None
    if previous is not None and previous.folder.resolve() == folder.resolve():
        raise UserError(f"--output_dir {folder} is the stage before; give the new stage a folder of its own")
    keys = Pool.read(args.retriever_state_dict) if recipe.needs_keys else no_slots(base)
    folder_named: Any = opened_to_links(data_args.image_folder or sequence.image_folder, data_args.follow_links)
    data_args.image_folder = folder_named
    files = [data_args.data_path] if data_args.data_path else recipe.files(sequence, data_args.task)
    rows = read_training_rows(files, tasks_of(recipe, sequence, data_args.task))
    config = asked_config(base, recipe.needs_keys, model_args, data_args)
    if recipe.needs_keys:
        check_frozen_base(config, model_args, data_args, args)
    prompt = stage_prompt(model_args, data_args, args, sequence, config, keys.prompt)
    if previous is not None and (changed := prompt.difference(previous.pool.prompt)):
        rank0_print(f"note: earlier tasks were trained with another prompt and will be asked with this one: {changed}")
    # A task's run does not depend on its place in the sequence, nor do its random numbers.
    seed = seed_of(data_args.task or "", args.seed, "training") % 2**31
    groups = (model_args, data_args, args, options)
    first = first_version(model_args, data_args, args, sequence.answer_style, files)
    run = Run(folder, {}, defaults(*groups), first, has_slots=recipe.needs_keys)
    name = str(model_args.model_name_or_path)
    context = Context(sequence, data_args.task or "", options, seed, run, previous, keys, base, name)
    context.model_args, context.args = model_args, args
    rows = recipe.rows(context, rows)
    run.record = {
        "record": VERSION,
        **settings_record(*groups),
        "prompt": prompt.to_dict(),
        "base": keys.base.get("fingerprint"),
        "base_content": content_of(base.manifest),
        **({"keys": checksums([args.retriever_state_dict])[0]} if recipe.needs_keys else {}),
        **({"offset_scope": keys.settings.offset_scope} if keys.settings.offset_scope != ALL else {}),
        **({} if recipe.needs_keys else parts_record(model_args)),
        "training_files": checksums(files),
        "pictures": pictures_checksum(rows, data_args.image_folder),
        "world_size": args.world_size,
        "deepspeed": deepspeed_record(args.deepspeed),
        **({} if previous is None else previous.contents()),
    }
    return context, prompt, rows


def no_sequence(name: str) -> TaskSequence:
    """For a recipe without tasks: its rows, pictures and settings are those of the command line."""
    return TaskSequence(name, name, (), "", "")


def no_slots(base: Checkpoint) -> Pool:
    """For a recipe without keys: a pool that holds nothing, over this base."""
    settings = RetrieverSettings(num_layers=llava_config(base).num_hidden_layers, features={})
    return Pool(settings, (), base.identity(str(base)))


def prepare(
    recipe: Recipe,
    context: Context,
    prompt: Prompt,
    rows: list[Row],
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
) -> LLaVATrainer:
    """Load and freeze the base, let the recipe attach what trains, and build the trainer over the rows."""
    model, tokenizer, image_processor = load_for_training(recipe, context, prompt, model_args, data_args, args)
    context.model, context.tokenizer = model, tokenizer
    groups = list(recipe.begin(context))
    parameters = [one for group in groups for one in (group["params"] if isinstance(group, Mapping) else [group])]
    prompt.tell(model.config)
    context.pool.prompt = prompt.to_dict()
    before = None if context.previous is None else context.previous.folder
    lora = add_lora(model, args, before, context.base_name, recipe.needs_keys)
    for parameter in parameters:  # PEFT freezes whatever is not its own
        parameter.requires_grad_(True)
        if not args.deepspeed:
            parameter.data = parameter.data.float()  # what an optimizer adds to a half-precision weight is lost
    if lora is not None:
        context.more_files.append(lambda folder: save_lora(folder, lora, context.state))
    rank0_print(f"{title(context)}: {len(rows)} rows; {what_trains(recipe, context, parameters)}")
    encoder = PromptEncoder(prompt, tokenizer, image_processor, model.config, data_args.image_folder)
    source = picture_source(model, context.base, prompt, data_args.image_folder, args)
    settings = context.pool.settings
    build = partial(build_dataset, encoder=encoder, settings=settings, source=source, args=args)
    dataset, held_out = build(rows, apart=data_args.turns_apart), None
    if data_args.eval_data_path:
        asked = read_training_rows([data_args.eval_data_path], tasks_of(recipe, context.sequence, context.task))
        held_out = build(asked, apart=data_args.turns_apart)
    for each in filter(None, (dataset, held_out)):
        recipe.samples(context, each)
    share_prefixes(model, context.base, filter(None, (dataset, held_out)), settings, args)
    if args.checkpoint_if_needed:
        settle_checkpointing(model, max(dataset.lengths), args, zero_stage(args.deepspeed))
    exact = trainable_state(model) if args.deepspeed and not recipe.writes_whole(context) else {}
    trainer = build_trainer(recipe, context, dataset, args, held_out)
    trainer.exact = exact
    trainer.groups = [group for group in groups if isinstance(group, Mapping)]
    return trainer


def build_trainer(
    recipe: Recipe,
    context: Context,
    dataset: TrainingSamples,
    args: TrainingArguments,
    held_out: TrainingSamples | None,
) -> LLaVATrainer:
    """The trainer, with what a frozen base asks for; ``held_out`` is a dataset for a validation loss."""
    if held_out is not None:
        args.prediction_loss_only = True  # logits of a whole file would fill the memory
        args.eval_strategy = "epoch" if args.eval_strategy == "no" else args.eval_strategy
    if args.gradient_checkpointing:
        args.gradient_checkpointing_kwargs = {"use_reentrant": False}  # slots are gathered: not leaves of the graph
    args.save_total_limit = max(args.save_total_limit or 2, 2)  # the newest may still be half-written
    args.logging_nan_inf_filter = False  # or a loss that is not a number would be logged, and pass, as one that is
    context.model.config.use_cache = False
    with slots_count_as_adapters(context.model):
        trainer = LLaVATrainer(
            model=context.model,
            args=args,
            train_dataset=dataset,
            eval_dataset=held_out,
            data_collator=DataCollatorForSupervisedDataset(context.tokenizer, hold_queries=True),
            processing_class=context.tokenizer,
            recipe=recipe,
            context=context,
        )
    show_steps(trainer, title(context))
    return trainer


def finish(recipe: Recipe, context: Context, trainer: LLaVATrainer, loss: float, args: TrainingArguments) -> None:
    """Collect what was trained, let the recipe end and write the stage, and remove the checkpoints.

    Raises:
        UserError: the loss or a weight is no number.
    """
    model, run = context.model, context.run
    whole = recipe.writes_whole(context)
    context.state = {} if whole else trainable_state(model)
    if not all_finite(model) or not torch.isfinite(torch.tensor(loss)):
        raise UserError(f"the training loss is {loss}; lower --learning_rate, and remove {run.work}")
    model.eval()  # dropout is over, whatever the recipe works out now
    recipe.end(context, trainer.single_rows())
    if whole or args.save_full_model:
        dtype = base_dtype(args) if whole else None
        context.more_files.append(partial(save_whole_state, model=model, state=whole_state(model, dtype), dtype=dtype))
    # In the order in which a checkpoint holds each line's numbers: a run that went on from one writes the same file.
    context.log_history = [dict(sorted(line.items())) for line in trainer.state.log_history]
    write_stage(recipe, context, len(trainer.train_dataset), args)


def write_untrained(
    recipe: Recipe,
    context: Context,
    prompt: Prompt,
    model_args: ModelArguments,
    data_args: DataArguments,
    args: TrainingArguments,
) -> None:
    """Write the stage of a recipe that takes no steps."""
    context.model, context.tokenizer, _ = load_for_training(recipe, context, prompt, model_args, data_args, args)
    prompt.tell(context.model.config)
    context.pool.prompt = prompt.to_dict()
    if args.save_full_model:
        context.more_files.append(partial(save_whole_state, model=context.model, state=whole_state(context.model)))
    write_stage(recipe, context, 0, args)


def write_stage(recipe: Recipe, context: Context, rows: int, args: TrainingArguments) -> None:
    """Let the recipe write the stage, with its card that tells of ``rows`` rows, and remove the checkpoints."""
    model, run = context.model, context.run
    if args.should_save:
        vars(model.config).pop("quantization_config", None)  # says how this run held the base, not what the stage is
        if recipe.needs_keys:
            model.config.base_model_name_or_path = context.base_name
        else:
            model.config.use_cache = True  # for whoever asks the model
        context.more_files.append(partial(write_stage_card, context=context, rows=rows))
        recipe.write(context)
        shutil.rmtree(run.work, ignore_errors=True)


def main() -> None:
    """Command line of stage 2, and of LLaVA's own stages."""
    train()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # else its threads may abort a process that has done all its work


if __name__ == "__main__":
    run_cli(main)
