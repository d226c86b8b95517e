"""Models and folders: a model with slots is saved with all that its answers depend on, and is never read without it.

``save_pretrained`` of a loaded stage writes a stage that needs no base: full weights with the vision tower, config,
image processor, tokenizer, ``slots.pth`` and what the stage's method keeps beside it. ``slots.pth`` comes last, and a
config that says slots act here is refused where they are missing: a half-written folder never answers as its base.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from llava.checkpoints.card import write_merged_card
from llava.checkpoints.checkpoint import Checkpoint
from llava.checkpoints.kinds import ADAPTER_CONFIG, SLOTS_FILE
from llava.checkpoints.manifest import CHECKSUMS_FILE, seal
from llava.files import atomic_folder, atomic_write, share
from llava.slots.adapter import MEMORY_FILE, write_memory
from llava.slots.card import write_slots_card
from llava.slots.encoders import QUERY_TABLE_FILE, BaseEmbeddingEncoder, table_fingerprints
from llava.slots.parts import parts_of
from llava.slots.pool import Pool
from llava.targets import remove
from llava.utils import UserError, rank0_print

ADAPTER_PREFIX = "retriever."
OWN_WEIGHTS = "stage_has_weights"
"""In the ``config.json`` of a stage that was saved whole: without its weights it is not the stage over its base."""
HUB_OPTIONS = ("repo_id", "commit_message", "create_pr", "private", "token", "revision")


class StageFolder:
    """``save_pretrained`` and ``from_pretrained`` for the model classes: slots go with the model, both ways.

    Attributes:
        tokenizer: the checkpoint's, set by the loader; ``None`` for a model that was built otherwise.
        stage_memory: tensors that the stage's method keeps beside its slots, as they were read.
    """

    tokenizer: PreTrainedTokenizerBase | None = None
    stage_memory: Mapping[str, Tensor] = {}

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        *,
        with_slots: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write the model; with slots attached, a stage that loads without its base and answers the same.

        Args:
            save_directory: folder. state_dict: of the whole model, gathered by the caller.
            is_main_process: only this process writes. push_to_hub: upload the folder too, as ``push_to_hub`` does.
            with_slots: False writes the model under the slots alone, for a caller that writes the slots itself.
            max_shard_size, kwargs: as transformers' ``save_pretrained`` takes them.

        Raises:
            UserError: the folder is a stage's and this model has no slots, or it holds a LoRA that these weights have
                in them already; the model is quantised with a LoRA beside it, or its slots are spread over processes.
        """
        folder = Path(save_directory)
        model: Any = self
        hub = {name: kwargs.pop(name) for name in HUB_OPTIONS if push_to_hub and name in kwargs}
        before = _modified(folder)
        adapter = model.retriever if with_slots else None
        state, own = _split(state_dict)
        _check_target(model, folder, adapter, own)
        writes = is_main_process and adapter is not None
        if writes:
            parts = parts_of(folder / SLOTS_FILE).values()  # of a stage; here its slots will be one file
            beside = [folder / name for name in (SLOTS_FILE, MEMORY_FILE, QUERY_TABLE_FILE)]
            for file in (*beside, *parts):  # of an earlier save: they are written last
                remove(file)
        if is_main_process:
            remove(folder / CHECKSUMS_FILE)  # of an earlier save; the caller may write more than this
        stage = adapter is not None
        with _without_adapter(model), _told_its_tower(model, told=stage, as_stage=stage):
            super().save_pretrained(  # type: ignore[misc]
                folder, is_main_process, state, max_shard_size=max_shard_size, **kwargs
            )
        if is_main_process:
            share(folder.glob("*.safetensors"))
        if writes:
            _remove_stale_weights(folder, before)
            _write_beside(model, folder)
            _write_slots(model, folder, own, state)
        if push_to_hub and is_main_process:
            _upload(folder, [name for name, time in _modified(folder).items() if before.get(name) != time], **hub)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """What ``push_to_hub`` uploads: by then transformers has put a card of its own in the place of the stage's."""
        model: Any = self
        if model.retriever is not None:
            write_slots_card(Path(working_dir), model.retriever.pool, repo_id.rpartition("/")[2])
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, with_slots: bool = True, **kwargs: Any):
        """The model of a folder or hub name; of a stage, with its slots, over its base where it holds no weights.

        Args:
            with_slots: False for a caller that attaches the slots itself.
            args, kwargs: as transformers'; a stage's config is always its own, and ``model_base`` says where the base
                of a light stage is, if not where it was.

        Raises:
            UserError: the config says that slots act here and there are none; or as ``load_pretrained_model``.
        """
        folder = _stage_folder(pretrained_model_name_or_path, kwargs) if with_slots else None
        if folder is not None:
            from llava.model.builder import load_stage

            for name in ("config", "adapter_kwargs", "_from_auto"):  # transformers would put the LoRA on alone
                kwargs.pop(name, None)
            told = kwargs.pop("output_loading_info", False)
            model = load_stage(folder, **kwargs)
            whole: dict[str, Any] = {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
            return (model, whole) if told else model
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if with_slots:
            refuse_lost_slots(model.config, pretrained_model_name_or_path)
        return loaded


def refuse_lost_slots(config: Any, place: Any) -> None:
    """``UserError`` where a config (or its values) says that slots act on the model, for a folder that has none."""
    told = config.get("retriever") if isinstance(config, Mapping) else getattr(config, "retriever", None)
    if told:
        raise UserError(
            f"{place}: config.json says that slots act on this model, but {SLOTS_FILE} is not there, and without it "
            "the base would answer; save or copy the stage again"
        )


def refuse_lost_weights(stage: Checkpoint) -> None:
    """``UserError`` for a folder of slots that was saved with weights, which may be others than its base's."""
    if stage.has("config.json") and stage.config.get(OWN_WEIGHTS):
        raise UserError(f"{stage}: the stage was saved with weights of its own, which are gone; copy it again")


def save_whole_model(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor | None = None,
    max_shard_size: str = "5GB",
    made_of: Sequence[str] = (),
) -> None:
    """Write ``model`` to the new ``folder``, which appears under its name only when it is whole.

    Args:
        made_of: for the card, the checkpoint that it was made of and the base that this one needed; without, no card.

    Raises:
        UserError: ``folder`` exists already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is there already; give a new folder")
    with atomic_folder(folder) as partial, _told_its_tower(model):
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(partial)
        if image_processor is not None:
            image_processor.save_pretrained(partial)
        if made_of:
            write_merged_card(partial, folder.name, *made_of)
        seal(partial)
    rank0_print(f"written to {folder}")


def _split(state: dict[str, Tensor] | None) -> tuple[dict[str, Tensor] | None, dict[str, Tensor]]:
    """A given state as the model's part and the adapter's, without its prefix."""
    if state is None:
        return None, {}
    own = {name.removeprefix(ADAPTER_PREFIX): v for name, v in state.items() if name.startswith(ADAPTER_PREFIX)}
    return {name: value for name, value in state.items() if not name.startswith(ADAPTER_PREFIX)}, own


def _check_target(model: Any, folder: Path, adapter: nn.Module | None, own: dict[str, Tensor]) -> None:
    if model.retriever is None:
        if (folder / SLOTS_FILE).is_file():
            raise UserError(f"{folder} is a stage's folder and this model has no slots; give another folder")
        return
    if adapter is None:
        return
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{folder} holds a LoRA, which these weights have in them already; give another folder")
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise UserError(
            f"{folder}: a LoRA lies beside the weights; merge it (merge_and_unload), or load a quantised stage in full "
            "precision, to save it"
        )
    if not own and any(hasattr(parameter, "ds_id") for parameter in adapter.parameters()):
        raise UserError(f"{folder}: the slots are spread over processes; give state_dict= with the gathered weights")


@contextlib.contextmanager
def _without_adapter(model: Any) -> Iterator[None]:
    """The model as transformers saves it: slots have a file of their own."""
    adapter = model._modules.pop("retriever", None)
    try:
        yield
    finally:
        if adapter is not None:
            model._modules["retriever"] = adapter


@contextlib.contextmanager
def _told_its_tower(model: Any, told: bool = True, as_stage: bool = False) -> Iterator[None]:
    """``vision_config`` in the config while it is written: the tower's weights go along, fine-tuned or not.

    Args:
        as_stage: say there, too, that the weights belong to the slots.
    """
    find_tower = getattr(model, "get_vision_tower", None)  # a plain language model has none
    tower = find_tower() if find_tower and told else None
    before = dict(vars(model.config))
    if tower is not None and tower.is_loaded:
        model.config.vision_config = tower.config.to_dict()
    if as_stage:
        model.config.update({OWN_WEIGHTS: True})
    try:
        yield
    finally:
        vars(model.config).pop(OWN_WEIGHTS, None)
        if "vision_config" in before:
            model.config.vision_config = before["vision_config"]
        else:
            vars(model.config).pop("vision_config", None)


def _write_beside(model: Any, folder: Path) -> None:
    """Tokenizer and image processor, where the caller has not written his own."""
    tower = model.get_vision_tower()
    if tower is not None and tower.image_processor is not None and not (folder / "preprocessor_config.json").is_file():
        tower.image_processor.save_pretrained(folder)
    if model.tokenizer is not None and not (folder / "tokenizer_config.json").is_file():
        model.tokenizer.save_pretrained(folder)


def _write_slots(model: Any, folder: Path, own: dict[str, Tensor], state: dict[str, Tensor] | None) -> None:
    """The slots as they are now, with the prompt they are asked by, and what goes with them."""
    adapter = model.retriever
    pool: Pool = adapter.pool
    if own:
        pool = copy.deepcopy(pool)
        pool.load_state_dict({k.removeprefix("pool."): v for k, v in own.items() if k.startswith("pool.")})
    pool = pool.with_tasks(pool.tasks)
    pool.prompt = pool.prompt or dict(getattr(model.config, "prompt", None) or {})
    now = {**adapter.state_dict(), **own}
    memory = {name: now.get(name, value).detach().cpu().clone() for name, value in model.stage_memory.items()}
    if memory:
        write_memory(folder, memory)
    encoder, identity = adapter.encode_text, pool.settings.encoder
    if isinstance(encoder, BaseEmbeddingEncoder):
        table = model.get_input_embeddings().weight if state is None else state["model.embed_tokens.weight"]
        if identity["fingerprint"] not in table_fingerprints(table):  # saved in a coarser type, or grown since
            with atomic_write(folder / QUERY_TABLE_FILE, "wb") as stream:
                table = {"table": encoder.table.contiguous()}
                stream.write(safetensors_bytes(table, {"fingerprint": identity["fingerprint"]}))
    write_slots_card(folder, pool)
    pool.write(folder / SLOTS_FILE)


def _modified(folder: Path) -> dict[str, int]:
    """When each file of a folder was written, by name; empty where there is no folder."""
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*") if file.is_file()}


def _remove_stale_weights(folder: Path, before: dict[str, int]) -> None:
    """Of an earlier save in one file where this one has shards, or the other way round; shards go by themselves."""
    now = _modified(folder)
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME):
        if name in now and before.get(name) == now[name]:
            remove(folder / name)


def _upload(
    folder: Path, names: list[str], repo_id: str | None = None, private: bool | None = None, **hub: Any
) -> None:
    from huggingface_hub import create_repo, upload_folder

    repo_id = create_repo(repo_id or folder.name, private=private, token=hub.get("token"), exist_ok=True).repo_id
    upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=names, **hub)


def _stage_folder(place: Any, options: Mapping[str, Any]) -> Path | None:
    """The local folder of a stage (fetched from the hub where ``place`` is a name), ``None`` for anything else."""
    from transformers.utils import cached_file

    if Path(place).is_dir():
        return Path(place) if (Path(place) / SLOTS_FILE).is_file() else None
    if str(place).count("/") > 1:  # neither a folder nor a hub name: transformers says so
        return None
    hub = {name: options[name] for name in ("cache_dir", "revision", "token", "local_files_only") if name in options}
    missing = {
        f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")
    }
    if cached_file(str(place), SLOTS_FILE, **hub, **missing) is None:
        return None
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(place), **hub))
