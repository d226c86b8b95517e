"""LLaVA's names: what the page promises is there, what it leaves out is not, functions take LLaVA's arguments."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny_llava import make_tokenizer
from transformers import CLIPImageProcessorPil

from llava import mm_utils
from llava.conversation import conv_vicuna_v1

PAGE = Path(__file__).resolve().parents[1] / "docs" / "llava-names.md"
HERE, LEFT_OUT = "here", "left out"

SIGNATURES = """
llava.conversation.Conversation(system, roles, messages, offset, sep_style, sep='###', sep2=None, version='Unknown',
    skip_next=False)
llava.conversation.Conversation.get_prompt(self)
llava.conversation.Conversation.append_message(self, role, message)
llava.conversation.Conversation.process_image(self, image, image_process_mode, return_pil=False, image_format='PNG',
    max_len=1344, min_len=672)
llava.conversation.Conversation.get_images(self, return_pil=False)
llava.conversation.Conversation.to_gradio_chatbot(self)
llava.conversation.Conversation.copy(self)
llava.conversation.Conversation.dict(self)
llava.mm_utils.select_best_resolution(original_size, possible_resolutions)
llava.mm_utils.resize_and_pad_image(image, target_resolution)
llava.mm_utils.divide_to_patches(image, patch_size)
llava.mm_utils.get_anyres_image_grid_shape(image_size, grid_pinpoints, patch_size)
llava.mm_utils.process_anyres_image(image, processor, grid_pinpoints)
llava.mm_utils.load_image_from_base64(image)
llava.mm_utils.expand2square(pil_img, background_color)
llava.mm_utils.process_images(images, image_processor, model_cfg)
llava.mm_utils.tokenizer_image_token(prompt, tokenizer, image_token_index=-200, return_tensors=None)
llava.mm_utils.get_model_name_from_path(model_path)
llava.mm_utils.KeywordsStoppingCriteria(keywords, tokenizer, input_ids)
llava.mm_utils.KeywordsStoppingCriteria.call_for_batch(self, output_ids, scores)
llava.mm_utils.KeywordsStoppingCriteria.__call__(self, output_ids, scores)
llava.utils.build_logger(logger_name, logger_filename)
llava.utils.StreamToLogger(logger, log_level=20)
llava.utils.disable_torch_init()
llava.utils.violates_moderation(text)
llava.utils.pretty_print_semaphore(semaphore)
llava.model.builder.load_pretrained_model(model_path, model_base, model_name, load_8bit=False, load_4bit=False,
    device_map='auto', device='cuda', use_flash_attn=False)
llava.model.llava_arch.unpad_image(tensor, original_size)
llava.model.llava_arch.LlavaMetaModel.get_vision_tower(self)
llava.model.llava_arch.LlavaMetaModel.initialize_vision_modules(self, model_args, fsdp=None)
llava.model.llava_arch.LlavaMetaForCausalLM.get_model(self)
llava.model.llava_arch.LlavaMetaForCausalLM.get_vision_tower(self)
llava.model.llava_arch.LlavaMetaForCausalLM.encode_images(self, images)
llava.model.llava_arch.LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal(self, input_ids, position_ids,
    attention_mask, past_key_values, labels, images, image_sizes=None)
llava.model.llava_arch.LlavaMetaForCausalLM.initialize_vision_tokenizer(self, model_args, tokenizer)
llava.model.language_model.llava_llama.LlavaLlamaModel(config)
llava.model.language_model.llava_llama.LlavaLlamaForCausalLM(config)
llava.model.language_model.llava_llama.LlavaLlamaForCausalLM.generate(self, inputs=None, images=None, image_sizes=None)
llava.model.language_model.llava_mistral.LlavaMistralModel(config)
llava.model.language_model.llava_mistral.LlavaMistralForCausalLM(config)
llava.model.language_model.llava_mistral.LlavaMistralForCausalLM.generate(self, inputs=None, images=None,
    image_sizes=None)
llava.model.multimodal_encoder.builder.build_vision_tower(vision_tower_cfg)
llava.model.multimodal_encoder.clip_encoder.CLIPVisionTower(vision_tower, args, delay_load=False)
llava.model.multimodal_encoder.clip_encoder.CLIPVisionTower.load_model(self, device_map=None)
llava.model.multimodal_encoder.clip_encoder.CLIPVisionTower.feature_select(self, image_forward_outs)
llava.model.multimodal_encoder.clip_encoder.CLIPVisionTower.forward(self, images)
llava.model.multimodal_projector.builder.build_vision_projector(config, delay_load=False)
llava.model.consolidate.consolidate_ckpt(src_path, dst_path)
llava.model.utils.auto_upgrade(config)
llava.train.train.maybe_zero_3(param, ignore_status=False, name=None)
llava.train.train.get_peft_state_maybe_zero_3(named_params, bias)
llava.train.train.get_peft_state_non_lora_maybe_zero_3(named_params, require_grad_only=True)
llava.train.train.get_mm_adapter_state_maybe_zero_3(named_params, keys_to_match)
llava.train.train.find_all_linear_names(model)
llava.train.train.safe_save_model_for_hf_trainer(trainer, output_dir)
llava.train.train.smart_tokenizer_and_embedding_resize(special_tokens_dict, tokenizer, model)
llava.train.train.preprocess_multimodal(sources, data_args)
llava.train.train.preprocess_llama_2(sources, tokenizer, has_image=False)
llava.train.train.preprocess_v1(sources, tokenizer, has_image=False)
llava.train.train.preprocess_mpt(sources, tokenizer, has_image=False)
llava.train.train.preprocess_plain(sources, tokenizer)
llava.train.train.preprocess(sources, tokenizer, has_image=False)
llava.train.train.LazySupervisedDataset(data_path, tokenizer, data_args)
llava.train.train.DataCollatorForSupervisedDataset(tokenizer)
llava.train.train.make_supervised_data_module(tokenizer, data_args)
llava.train.train.train(attn_implementation=None)
llava.train.llava_trainer.split_to_even_chunks(indices, lengths, num_chunks)
llava.train.llava_trainer.get_modality_length_grouped_indices(lengths, batch_size, world_size, generator=None)
llava.train.llava_trainer.get_length_grouped_indices(lengths, batch_size, world_size, generator=None, merge=True)
llava.train.llava_trainer.LengthGroupedSampler(batch_size, world_size, lengths=None, generator=None,
    group_by_modality=False)
llava.eval.run_llava.eval_model(args)
llava.eval.run_llava.image_parser(args)
llava.eval.run_llava.load_image(image_file)
llava.eval.run_llava.load_images(image_files)
llava.eval.model_vqa.eval_model(args)
llava.eval.model_vqa_loader.eval_model(args)
llava.eval.model_vqa_science.eval_model(args)
llava.eval.model_vqa_mmbench.eval_model(args)
llava.eval.model_qa.eval_model(model_name, questions_file, answers_file)
llava.serve.cli.load_image(image_file)
"""
LINES = re.sub(r"\n\s+", " ", SIGNATURES).strip().splitlines()


def found_at(path: str):
    """What a dotted path names: a module, or a name in one."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if importlib.util.find_spec(parts[0]) and _is_module(name):
            found = importlib.import_module(name)
            for part in parts[length:]:
                found = getattr(found, part)
            return found
    raise ModuleNotFoundError(path)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is none
        return False


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split("(")[0].removeprefix("llava."))
def test_functions_take_llavas_arguments(line):
    """The same names in the same order with the same defaults; what this project adds has a default."""
    path, arguments = line.rstrip(")").split("(", 1)
    theirs = [word.partition("=") for word in arguments.split(", ") if word]
    ours = list(inspect.signature(found_at(path)).parameters.values())
    assert [entry.name for entry in ours[: len(theirs)]] == [name for name, _, _ in theirs]
    for entry, (name, _, default) in zip(ours, theirs):
        assert entry.kind in (entry.POSITIONAL_ONLY, entry.POSITIONAL_OR_KEYWORD), name
        assert not default or repr(entry.default) == default, name
    for entry in ours[len(theirs) :]:
        assert entry.default is not entry.empty or entry.kind in (entry.VAR_POSITIONAL, entry.VAR_KEYWORD), entry.name


def rows_of_the_page() -> list[tuple[str, list[str], str, str]]:
    """``(module, names, where, note)`` of each row of a module's table."""
    rows, module = [], ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if heading := re.fullmatch(r"#+ (.+)", line):
            module = next(iter(re.findall(r"`(llava[\w.]*)`", heading[1])), "")
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if module and len(cells) == 3 and cells[0].startswith("`"):
            rows.append((module, re.findall(r"`([\w.]+)`", cells[0]), cells[1], cells[2]))
    return rows


ROWS = rows_of_the_page()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}:{row[1][0]}")
def test_the_page_keeps_its_promises(row):
    module, names, where, note = row
    if where == HERE:
        for name in names:
            found_at(f"{module}.{name}")
        return
    if where == LEFT_OUT:
        assert note, "no reason"
        assert not [name for name in names if _can_be_found(f"{module}.{name}")], "no longer left out"
        return
    paths = re.findall(r"`([\w.]+)`", where)
    assert paths and all(found_at(path) is not None for path in paths)


def _can_be_found(path: str) -> bool:
    try:
        found_at(path)
    except (ModuleNotFoundError, AttributeError):
        return False
    return True


MODULES = """
constants conversation mm_utils utils model model.apply_delta model.builder model.consolidate model.llava_arch
model.make_delta model.utils model.language_model.llava_llama model.language_model.llava_mistral
model.language_model.llava_mpt model.multimodal_encoder.builder model.multimodal_encoder.clip_encoder
model.multimodal_projector.builder train.llama_flash_attn_monkey_patch train.llama_xformers_attn_monkey_patch
train.llava_trainer train.train train.train_mem train.train_xformers eval.eval_gpt_review eval.eval_gpt_review_bench
eval.eval_gpt_review_visual eval.eval_pope eval.eval_science_qa eval.eval_science_qa_gpt4
eval.eval_science_qa_gpt4_requery eval.eval_textvqa eval.generate_webpage_data_from_table eval.m4c_evaluator
eval.model_qa eval.model_vqa eval.model_vqa_loader eval.model_vqa_mmbench eval.model_vqa_qbench eval.model_vqa_science
eval.qa_baseline_gpt35 eval.run_llava eval.summarize_gpt_review serve.cli serve.controller serve.gradio_web_server
serve.model_worker serve.register_worker serve.sglang_worker serve.test_message
"""
"""The modules of LLaVA 1.2.2 that hold anything."""


def test_the_page_has_every_module_of_llava():
    headings = re.findall(r"^### `llava\.?(\S*)`$", PAGE.read_text(encoding="utf-8"), re.M)
    assert sorted(filter(None, headings)) == sorted(MODULES.split()) and "" in headings


def test_each_function_whose_arguments_are_known_is_on_the_page():
    promised = {f"{module}.{name}" for module, names, where, _ in ROWS if where == HERE for name in names}
    named = {line.split("(")[0] for line in LINES}
    assert not sorted(path for path in named - promised if not path.endswith("__call__"))


def test_what_other_programs_import_most_takes_llavas_places():
    """A call with LLaVA's positional arguments, through the pictures' helpers."""
    picture = Image.new("RGB", (30, 20), "red")
    assert mm_utils.select_best_resolution((30, 20), [(16, 16), (32, 16)]) == (32, 16)
    padded = mm_utils.resize_and_pad_image(picture, (32, 16))
    assert [tile.size for tile in mm_utils.divide_to_patches(padded, 16)] == [(16, 16)] * 2
    assert mm_utils.get_anyres_image_grid_shape((30, 20), "[[16, 16], [32, 16]]", 16) == (2, 1)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    assert mm_utils.process_anyres_image(picture, processor, [[32, 16]]).shape == (3, 3, 16, 16)
    assert mm_utils.process_images([picture], processor, SimpleNamespace(image_aspect_ratio="pad")).shape[0] == 1
    assert mm_utils.expand2square(picture, (0, 0, 0)).size == (30, 30)
    assert mm_utils.load_image_from_base64(conv_vicuna_v1.process_image(picture, "Default")).size == (30, 20)
    tokenizer = make_tokenizer()
    ids = mm_utils.tokenizer_image_token("USER: <image>", tokenizer, -200, "pt")
    assert ids.tolist()[-1] == -200
    stopping = mm_utils.KeywordsStoppingCriteria(["yes"], tokenizer, ids[None])
    spoken = torch.tensor([[*ids.tolist(), *tokenizer("yes", add_special_tokens=False)["input_ids"]]])
    assert stopping(spoken, None).tolist() == [True] and not stopping.call_for_batch(ids[None], None)
    assert mm_utils.get_model_name_from_path("a/llava-7b/checkpoint-9/") == "llava-7b_checkpoint-9"
