"""LLaVA's architecture: image features spliced into the text, and the route that picks weight offsets.

Two mix-ins, shared by every language model back-end:

- ``LlavaMetaModel`` adds the vision tower and the projector to a decoder (``LlamaModel``, ``MistralModel``).
- ``LlavaMetaForCausalLM`` adds ``forward`` and ``generate`` that take images (``PicturedText``) and questions. The
  route (which slots, with which weights, for each question) is decided once, before the first token, and is reused by
  every decoding step. An adapter (``llava.slots.adapter``) decides it and acts on it: its offsets reach the projections
  as a keyword argument (``llava.slots.offsets``), its prefix embeddings stand in front of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.answer_loss import answer_loss
from llava.model.apart import spread, who_sees_whom
from llava.model.decision import Decision, Prefill, cache_of, cached_length, carried, carry, continue_mask
from llava.model.grown_cache import grown_cache
from llava.model.multimodal_encoder.builder import build_vision_tower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.pictured_text import PicturedText
from llava.model.prefixes import Names, SharedPrefixes
from llava.model.routed import Asked, Routed
from llava.model.splice import check_prompts
from llava.model.vision.blank import blank_feature, blank_needed
from llava.model.vision.hand_out import Images, are_modalities
from llava.model.vision.setup import initialize_vision_modules, initialize_vision_tokenizer
from llava.model.vision.tiles import unpad_image
from llava.slots.offsets import ARGUMENT
from llava.slots.picture_query import image_queries
from llava.slots.route import Route

__all__ = ["LlavaMetaForCausalLM", "LlavaMetaModel", "unpad_image"]


class LlavaMetaModel:
    """Adds ``vision_tower``, ``mm_projector`` and ``image_newline`` to a decoder."""

    def __init__(self, config):
        super().__init__(config)
        has_tower = getattr(config, "mm_vision_tower", None) or getattr(config, "vision_config", None)
        if has_tower:
            self.vision_tower = build_vision_tower(config, delay_load=True)
            self.mm_projector = build_vision_projector(config)
            if "unpad" in (getattr(config, "mm_patch_merge_type", None) or ""):
                self.image_newline = nn.Parameter(torch.zeros(config.hidden_size))

    def get_vision_tower(self):
        return getattr(self, "vision_tower", None)

    def initialize_vision_modules(self, model_args, fsdp=None) -> None:
        """Give a decoder the tower and projector that ``model_args`` names; see ``vision.setup``."""
        initialize_vision_modules(self, model_args)


class LlavaMetaForCausalLM(Routed, SharedPrefixes, PicturedText):
    """``forward`` and ``generate`` with images and per-question routes, for any decoder with LLaVA's mix-in."""

    # -- parts ---------------------------------------------------------------------------------------------------

    def get_model(self) -> LlavaMetaModel:
        return self.model

    def initialize_vision_tokenizer(self, model_args, tokenizer) -> None:
        """Add the picture tokens that a LLaVA's prompts hold; see ``vision.setup``."""
        initialize_vision_tokenizer(self, model_args, tokenizer)

    def image_query(self, features: list[list[Tensor]], images: Images | None) -> Tensor | None:
        """Image queries ``[batch, image_dim]`` from tower features and pixels; ``None`` where no slot asks for them."""
        if self.retriever is None or not self.retriever.active or not self.retriever.settings.uses_images:
            return None
        settings = self.retriever.settings
        pixels = [[] for _ in features] if images is None else self.read_images(images)
        return image_queries(settings.image_query, features, pixels, settings.image_dim)

    # -- text and pictures together --------------------------------------------------------------------------------

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids,
        position_ids,
        attention_mask,
        past_key_values,
        labels,
        images,
        image_sizes=None,
        modalities=None,
        questions: Sequence[str] | None = None,
        text_query: Tensor | None = None,
        image_query: Tensor | None = None,
        tasks: Sequence[str | None] | None = None,
        route: Route | str | None = None,
    ):
        """LLaVA's entry point: replace ``<image>`` placeholders by features.

        LLaVA-NeXT's order, ``modalities`` before ``image_sizes``, is known by its names. The arguments behind them are
        those of ``forward``: the route is decided here, and ``forward`` and ``generate`` know it by the embeddings.

        Returns ``(None, position_ids, attention_mask, past_key_values, inputs_embeds, labels)``, or the arguments
        unchanged (with ``inputs_embeds`` None) when there is nothing to splice.
        """
        if are_modalities(image_sizes):
            image_sizes, modalities = modalities, image_sizes
        pictures, image_sizes = self.hand_out(input_ids, attention_mask, images, image_sizes, modalities)
        if self.get_vision_tower() is None or images is None or input_ids.shape[1] == 1:
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        pictures = [[] for _ in input_ids] if pictures is None else pictures
        features = self.vision_features(pictures)
        asked = Asked(questions, text_query, image_query, tasks, route)
        if cached_length(past_key_values):
            decision = self._continued(asked, carried(past_key_values))
        else:
            decision = self._begun(asked, input_ids, None, attention_mask, labels, features, pictures)
        prefix = decision.action(len(input_ids), self.get_model().embed_tokens.weight.dtype).prefix
        projected = self.project_features(features, image_sizes)
        embeds, mask, positions, new_labels, _, starts = self._splice(
            input_ids, attention_mask, labels, projected, prefix=None if cached_length(past_key_values) else prefix
        )
        decision = decision.starting(starts)
        self._embedding_routes.remember(embeds, decision.route, starts)
        self._settle(decision.route)
        return (
            None,
            positions if position_ids is not None else None,
            mask.to(attention_mask.dtype) if attention_mask is not None else None,
            past_key_values,
            embeds,
            new_labels if labels is not None else None,
        )

    # -- forward and generate --------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        images: Images | None = None,
        image_sizes: Any = None,
        modalities: Sequence[str] | None = None,
        image_features: list[list[Tensor]] | None = None,
        questions: Sequence[str] | None = None,
        text_query: Tensor | None = None,
        image_query: Tensor | None = None,
        tasks: Sequence[str | None] | None = None,
        route: Route | str | None = None,
        slot_indices: torch.LongTensor | None = None,
        slot_weights: Tensor | None = None,
        segments: torch.LongTensor | None = None,
        answers_only: bool = False,
        picture_names: Names | None = None,
        truths: Tensor | None = None,
        **kwargs,
    ):
        """Next-token logits, and the cross-entropy on ``labels`` where given.

        Args:
            images, image_sizes: the batch's pictures (see ``vision.hand_out``) and their original ``(width, height)``.
            modalities: LLaVA-NeXT's; pictures are known, videos are not.
            image_features: what ``vision_features(images)`` gives, computed before; then ``images`` is not needed.
            questions, text_query, image_query, tasks: as in ``generate``; with a filled cache they count for nothing.
            route: a route decided before, or ``"none"``: the base model answers.
            slot_indices, slot_weights: ``[batch, k]`` a route decided before, as its two tensors.
            segments: ``[batch, length]``, right-padded: which turns see each other (``llava.model.apart``).
            answers_only: compute the loss on ``labels`` and no other logits than it needs, ``[answer tokens, vocab]``.
            picture_names: tell each row's pictures apart. With them, ``labels`` and a store of prefixes
                (``llava.model.prefixes``) only what stands behind the pictures is run, where that gives the same loss;
                logits are then those of these positions.
            truths: ``[batch, words]`` what is true of the pictures: the loss is ``naming``'s, without the decoder.

        Without a word of the question the prompt's own decides (see ``QuestionReader.read``). A step with a filled
        cache keeps the route of its prefill, and ``inputs_embeds`` that of ``prepare_inputs_labels_for_multimodal``.

        Raises:
            ValueError: the route of a cache or of embeddings is not known.
        """
        looked, embedded = image_features is not None, inputs_embeds is not None
        length = cached_length(past_key_values)
        before = carried(past_key_values) if length else None
        before = None if before is None else before.cut(length)
        if not length:
            check_prompts(input_ids, attention_mask)
        handed = images is not None or image_features is not None
        if length and handed and input_ids is not None and not (input_ids == IMAGE_TOKEN_INDEX).any():
            images = image_features = None  # of the prefill; some loops hand them over at every step
        if image_features is None or images is not None:
            images, image_sizes = self.hand_out(input_ids, attention_mask, images, image_sizes, modalities)
        if image_features is None and images is not None and self.get_vision_tower() is not None:
            image_features = self.vision_features(images)
        if truths is not None:
            projected = self.project_features(image_features or [], image_sizes)
            return CausalLMOutputWithPast(self.naming.loss([torch.cat(row) for row in projected], truths))
        pictureless = labels is not None and not (embedded or length or any(image_features or ()))
        blank = blank_feature(self, not looked) if pictureless and blank_needed(self) else None
        given = route if slot_indices is None else Route(slot_indices, slot_weights)
        asked = Asked(questions, text_query, image_query, tasks, given)
        if length:
            decision = self._continued(asked, before)
        else:
            decision = self._begun(asked, input_ids, inputs_embeds, attention_mask, labels, image_features, images)
        if not isinstance(route, Decision):
            decision = self._starting(decision, inputs_embeds, length)
        rows = len(_first_given(input_ids, inputs_embeds))
        dtype = self.get_model().embed_tokens.weight.dtype if inputs_embeds is None else inputs_embeds.dtype
        action = decision.action(rows, dtype)
        plain = not (embedded or length or use_cache) and position_ids is None and segments is None
        if picture_names is not None and labels is not None and plain and self._may_share(decision, action, kwargs):
            rows_of = input_ids, attention_mask, labels, picture_names, image_features, image_sizes
            if (behind := self._behind(*rows_of)) is not None:
                given = kwargs | behind.inputs | {ARGUMENT: action.offset}
                out = self._passed(behind.labels, answers_only, **given)
                out.past_key_values = None
                return out
        prefix = None if length else action.prefix
        spliced_mask, pictures = None, [[] for _ in range(rows)]
        ids, mask = input_ids, attention_mask
        if inputs_embeds is None and (image_features is not None or prefix is not None):
            features = [[] for _ in input_ids] if image_features is None else image_features
            projected = self.project_features(features, image_sizes)
            inputs_embeds, attention_mask, position_ids, spliced, _, starts = self._splice(
                input_ids, attention_mask, labels, projected, prefix=prefix
            )
            labels = None if labels is None else spliced
            decision = decision.starting([length + start for start in starts])
            input_ids, spliced_mask, pictures = None, attention_mask, projected
        if segments is not None:
            taken = [[len(picture) for picture in row] for row in pictures]
            total = _first_given(input_ids, inputs_embeds).shape[1]
            added = dtype if self.config._attn_implementation == "eager" else None
            attention_mask, position_ids = who_sees_whom(spread(segments, ids, mask, taken, total), added)
        if blank is not None:
            embeds = self.get_model().embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            input_ids, inputs_embeds = None, embeds + blank.to(embeds.dtype)
        if before is not None and before.mask is not None:
            new = _first_given(input_ids, inputs_embeds).shape[1]
            attention_mask, position_ids = continue_mask(before.mask, rows, new, attention_mask, position_ids)
            spliced_mask = attention_mask
        kwargs |= {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        kwargs |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache}
        kwargs[ARGUMENT] = decision.placed(action.offset, *_first_given(input_ids, inputs_embeds).shape[:2], length)
        out = self._passed(labels, answers_only, **kwargs)
        carry(cache_of(out, past_key_values), Prefill(decision, spliced_mask))
        return out

    def _passed(self, labels: Tensor | None, answers_only: bool, **kwargs):
        """The back-end's own pass, or with ``answers_only`` its decoder's and the loss of the answers."""
        if labels is None or not answers_only:
            return super().forward(labels=labels, **kwargs)
        items = kwargs.pop("num_items_in_batch", None)
        hidden = self.get_model()(**kwargs).last_hidden_state
        return CausalLMOutputWithPast(*answer_loss(self.lm_head, hidden, labels, items))

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        images: Images | None = None,
        image_sizes: Any = None,
        modalities: Sequence[str] | None = None,
        image_features: list[list[Tensor]] | None = None,
        questions: Sequence[str] | None = None,
        text_query: Tensor | None = None,
        image_query: Tensor | None = None,
        tasks: Sequence[str | None] | None = None,
        route: Route | str | None = None,
        picture_names: Names | None = None,
        **kwargs,
    ) -> Tensor:
        """Answer token ids ``[batch, new tokens]`` (only the new ones).

        Text alone, given by the keyword ``input_ids``, is a call in transformers' manner, which no LLaVA program makes:
        the prompt stands in front of the new tokens, where ``pipeline`` and its like cut it off.

        Args:
            inputs: ``[batch, length]`` prompt ids with ``IMAGE_TOKEN_INDEX`` where the picture goes (also accepted as
                ``input_ids``), padded on either side and described by ``attention_mask``. Instead of them,
                ``inputs_embeds`` of ``prepare_inputs_labels_for_multimodal``.
            images, image_sizes, modalities, image_features: as in ``forward``.
            questions: the plain questions; encoded into the text query when the model has slots that route on text.
                By default they are read from the prompts.
            text_query: ``[batch, text_dim]`` the same, already encoded.
            image_query: ``[batch, image_dim]`` computed before; by default it comes from the pictures.
            tasks: the true task of each question; given, only that task's slots compete (oracle routing); ``None`` in a
                row: the router decides.
            route: a route decided before, or ``"none"``: the base model answers.
            picture_names: tell each row's pictures apart. With them and a store of prefixes (``llava.model.prefixes``)
                the prefill begins behind the pictures, where that gives the same answer.

        The route used is kept as ``last_route`` (``None`` when the base model answered).

        Raises:
            ValueError: the route is not known, or there are not as many questions as prompts.
        """
        text_alone = inputs is None and images is None and image_features is None and questions is None
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        embeds, mask = kwargs.pop("inputs_embeds", None), kwargs.pop("attention_mask", None)
        kwargs.pop("position_ids", None)
        _refuse_assistant(kwargs)
        if (input_ids is None) == (embeds is None):
            raise ValueError("generate() needs the prompts' ids, or inputs_embeds, and not both")
        check_prompts(input_ids, mask)
        if image_features is None or images is not None:
            images, image_sizes = self.hand_out(input_ids, mask, images, image_sizes, modalities)
        if image_features is None and images is not None and self.get_vision_tower() is not None:
            image_features = self.vision_features(images)
        asked = Asked(questions, text_query, image_query, tasks, route)
        decision = self._begun(asked, input_ids, embeds, mask, None, image_features, images)
        self._settle(decision.route)
        goes_on = self._may_go_on(kwargs, self.generation_config)
        if embeds is None:
            features = [[] for _ in input_ids] if image_features is None else image_features
            action = decision.action(len(input_ids), self.get_model().embed_tokens.weight.dtype)
            laid = None
            if picture_names is not None and goes_on and self._may_share(decision, action, kwargs):
                laid = self._laid_out(input_ids, mask, picture_names, features, image_sizes)
            if laid is not None:
                embeds, mask, kwargs["past_key_values"], start = laid
                starts = [start] * len(input_ids)
            else:
                projected = self.project_features(features, image_sizes)
                embeds, mask, _, _, _, starts = self._splice(input_ids, mask, None, projected, "left", action.prefix)
            decision = decision.starting(starts)
        else:
            decision = self._starting(decision, embeds)
        if goes_on:
            kwargs.setdefault("past_key_values", grown_cache(self.config))
        out = super().generate(
            inputs_embeds=embeds, attention_mask=None if mask is None else mask.long(), route=decision, **kwargs
        )
        return _behind_prompt(input_ids, out) if text_alone and input_ids is not None else out


_ASSISTED = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens")


def _refuse_assistant(options: dict[str, Any]) -> None:
    """Refuse decoding by candidates: an assistant would be asked with ids and embeddings both, the early exit of a
    refused one is never undone, and some versions of transformers look prompts up wrongly where they are embeddings.
    """
    settings = options.get("generation_config")
    if any(options.get(name) or getattr(settings, name, None) for name in _ASSISTED):
        raise ValueError("generate() knows no assistant model and no prompt look-up; leave them out")


def _behind_prompt(input_ids: Tensor, out):
    """What ``generate`` gave, its sequences behind their prompts."""
    new = out if isinstance(out, Tensor) else out.sequences
    whole = torch.cat([input_ids.repeat_interleave(len(new) // len(input_ids), 0), new], dim=1)
    if isinstance(out, Tensor):
        return whole
    out.sequences = whole
    return out


def _first_given(*values: Tensor | None) -> Tensor:
    return next(value for value in values if value is not None)
