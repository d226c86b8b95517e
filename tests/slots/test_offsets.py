"""Low-rank offsets equal their dense form, wherever and however the projection is called."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig

from llava.constants import IMAGE_TOKEN_INDEX
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.retriever import Retriever
from llava.slots import pool as pool_module
from llava.slots.offsets import TARGETS, WeightOffset, target_features, target_module
from llava.slots.pool import Pool
from llava.slots.settings import RetrieverSettings

HIDDEN, INNER, LAYERS, RANK, SLOTS, TOP_K, SCALE = 32, 48, 2, 3, 5, 2, 0.7
VOCABULARY = 60


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def make_model(targets=("o_proj",), slots=SLOTS, key_value_heads=2, vision=False) -> LlavaLlamaForCausalLM:
    """A random decoder with a pool of one trained task with random offsets."""
    more = {}
    if vision:
        tower = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        )
        more = {"vision_config": tower.to_dict(), "mm_hidden_size": 16, "mm_projector_type": "linear"}
    config = LlavaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **more,
    )
    model = LlavaLlamaForCausalLM(config).eval().requires_grad_(False)
    settings = RetrieverSettings(
        num_layers=LAYERS,
        features={target: target_features(config, target) for target in targets},
        text_dim=8,
        image_dim=16 if vision else None,
        query_mode="text+image" if vision else "text",
        rank=RANK,
        top_k=TOP_K,
        scale=SCALE,
        router="keys",
    )
    pool = Pool(settings)
    block = pool.append("abd", slots)
    block.text_keys.normal_()
    if vision:
        block.image_keys.normal_()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.3)
    block.trained = True
    model.attach_adapter(Retriever(pool))
    return model


def dense_model(model, slots: torch.Tensor, weights: torch.Tensor) -> LlavaLlamaForCausalLM:
    """The same model with ``W_o + scale * sum w A^T B`` formed for one sample."""
    dense = copy.deepcopy(model)
    dense.retriever = None
    block = model.retriever.pool.task("abd")
    for target in model.retriever.settings.targets:
        for number, layer in enumerate(dense.model.layers):
            change = sum(
                w * block.A[target][slot, number].T @ block.B[target][slot, number]
                for slot, w in zip(slots.tolist(), weights, strict=True)
            )
            target_module(layer, target).weight.data += SCALE * change.detach()
    return dense


def a_route(batch, slots=SLOTS):
    """Different slots and weights in every row."""
    chosen = torch.stack([torch.randperm(slots)[:TOP_K] for _ in range(batch)])
    return chosen, torch.rand(batch, TOP_K)


@pytest.fixture(params=["shared", "gathered"])
def form(request, monkeypatch):
    """Both ways to work the offsets out: products over all used slots, and a gather per sample."""
    monkeypatch.setattr(pool_module, "SHARED_FORM_LIMIT", 32 if request.param == "shared" else 0)
    return request.param


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# -- output and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_logits_equal_the_dense_form(form, target):
    model = make_model((target,))
    ids = torch.randint(3, VOCABULARY, (4, 7))
    slots, weights = a_route(4)
    logits = model(ids, slot_indices=slots, slot_weights=weights).logits
    for row in range(4):
        dense = dense_model(model, slots[row], weights[row])
        close(logits[row], dense(ids[row : row + 1]).logits[0])
    assert (logits - model(ids, route="none").logits).abs().amax(dim=(1, 2)).min() > 1e-3


def test_all_targets_at_once_equal_the_dense_form(form):
    model = make_model(TARGETS)
    ids = torch.randint(3, VOCABULARY, (3, 6))
    slots, weights = a_route(3)
    logits = model(ids, slot_indices=slots, slot_weights=weights).logits
    for row in range(3):
        torch.testing.assert_close(
            logits[row],
            dense_model(model, slots[row], weights[row])(ids[row : row + 1]).logits[0],
            atol=1e-4,
            rtol=1e-4,
        )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", [("o_proj",), ("q_proj", "down_proj")])
def test_all_gradients_equal_the_dense_form(form, checkpointing, targets):
    model = make_model(targets)
    block = model.retriever.pool.task("abd").requires_grad_(True)
    embeds = torch.randn(3, 5, HIDDEN)
    labels = torch.randint(3, VOCABULARY, (3, 5))
    slots, weights = a_route(3)

    x = embeds.clone().requires_grad_(True)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    loss = model(inputs_embeds=x, labels=labels, slot_indices=slots, slot_weights=weights, use_cache=False).loss
    loss.backward()

    reference = {name: p.detach().clone().requires_grad_(True) for name, p in block.named_parameters()}
    y = embeds.clone().requires_grad_(True)
    dense_loss = sum(_dense_loss(model, reference, y[row], labels[row], slots[row], weights[row]) for row in range(3))
    (dense_loss / 3).backward()
    close(loss.detach(), (dense_loss / 3).detach())
    close(x.grad, y.grad)
    for name, parameter in block.named_parameters():
        close(parameter.grad, reference[name].grad)
        assert parameter.grad.abs().max() > 1e-4


def _dense_loss(model, tensors, embeds, labels, slots, weights):
    """Loss of one sample with the dense offsets formed inside the graph."""
    dense = copy.deepcopy(model).eval()
    changed = {}
    for target in model.retriever.settings.targets:
        for number, layer in enumerate(dense.model.layers):
            module = target_module(layer, target)
            change = sum(
                w * tensors[f"A.{target}"][slot, number].T @ tensors[f"B.{target}"][slot, number]
                for slot, w in zip(slots.tolist(), weights, strict=True)
            )
            name = next(n for n, m in dense.named_modules() if m is module)
            changed[f"{name}.weight"] = module.weight.detach() + SCALE * change
    call = torch.func.functional_call
    given = {"inputs_embeds": embeds[None], "labels": labels[None], "use_cache": False, "route": "none"}
    return call(dense, changed, (), given).loss


def test_shared_and_gathered_form_agree(monkeypatch):
    model = make_model(slots=40)
    ids = torch.randint(3, VOCABULARY, (48, 5))  # more different slots in use than the shared form takes
    slots, weights = a_route(48, 40)
    assert len(slots.unique()) > pool_module.SHARED_FORM_LIMIT
    gathered = model(ids, slot_indices=slots, slot_weights=weights).logits
    monkeypatch.setattr(pool_module, "SHARED_FORM_LIMIT", 100)
    close(model(ids, slot_indices=slots, slot_weights=weights).logits, gathered)


def test_untrained_slots_change_nothing_at_all(form):
    model = make_model()
    block = model.retriever.pool.task("abd")
    block.init_offsets(model.retriever.settings, torch.Generator().manual_seed(1))
    assert block.A["o_proj"].abs().max() == 0 and block.B["o_proj"].abs().min() > 0
    ids = torch.randint(3, VOCABULARY, (2, 6))
    slots, weights = a_route(2)
    assert torch.equal(model(ids, slot_indices=slots, slot_weights=weights).logits, model(ids, route="none").logits)


def test_only_the_used_tasks_get_gradients():
    model = make_model()
    pool = model.retriever.pool
    pool.append("chest", SLOTS).init_offsets(pool.settings, torch.Generator().manual_seed(2))
    pool.task("chest").text_keys.normal_()
    trained = pool.train_only("chest")
    assert {id(p) for p in pool.parameters() if p.requires_grad} == {id(p) for p in trained}
    model(
        torch.randint(3, VOCABULARY, (2, 6)), labels=torch.ones(2, 6).long(), text_query=torch.randn(2, 8)
    ).loss.backward()
    assert all(p.grad is None for p in pool.task("abd").parameters())
    assert pool.task("chest").A["o_proj"].grad.abs().max() > 0


def operators(form_limit, monkeypatch):
    """Names of the operators of two layers' offsets, forward and backward."""
    monkeypatch.setattr(pool_module, "SHARED_FORM_LIMIT", form_limit)
    pool = make_model().retriever.pool
    pool.task("abd").requires_grad_(True)
    slots, weights = a_route(3)
    offset = pool(slots, weights, torch.float32)
    x = [torch.randn(3, 5, HIDDEN, requires_grad=True) for _ in range(LAYERS)]
    names = {"forward": [], "backward": []}

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names[phase].append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Noted():
        phase = "forward"
        out = sum(offset.add_to(x[layer] * 2, "o_proj", layer, x[layer]).sum() for layer in range(LAYERS))
        phase = "backward"
        out.backward()
    return names


@pytest.mark.parametrize(
    ("limit", "products"), [(32, {"mm": 1, "mul": 1, "addmm": 1}), (0, {"bmm": 1, "mul": 1, "baddbmm": 1})]
)
def test_a_layer_takes_three_operators_and_its_gradient_no_tensor_of_all_layers(monkeypatch, limit, products):
    names = operators(limit, monkeypatch)
    views = {
        "view",
        "_unsafe_view",
        "transpose",
        "permute",
        "squeeze",
        "t",
        "select",
        "expand",
        "detach",
        "unsqueeze",
        "alias",
    }
    work = Counter(name for name in names["forward"] if name not in views)
    work.subtract({"mul": LAYERS, "sum": LAYERS, "add": LAYERS})  # the projection that stands in, and the loss
    assert +work == Counter({name: LAYERS * count for name, count in products.items()})
    assert not {"select_backward", "slice_backward"} & set(names["backward"])


def test_a_slot_that_a_sample_did_not_select_makes_no_number_of_it_infinite():
    down = torch.ones(1, 1, 4, 8, dtype=torch.float16)
    down[:, :, 2:] *= 100  # of the second slot, whose products overflow
    gate = torch.tensor([[[0.5, 0.5, 0, 0]], [[0, 0, 0.5, 0.5]]], dtype=torch.float16)
    offset = WeightOffset({"o_proj": down}, {"o_proj": torch.ones(1, 1, 4, 8, dtype=torch.float16)}, gate)
    x = torch.full((2, 1, 8), 300.0, dtype=torch.float16)
    found = offset.add_to(torch.zeros_like(x), "o_proj", 0, x)
    assert torch.equal(found[0], torch.full((1, 8), 2400.0, dtype=torch.float16)) and found[1].isinf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_forms_equal_the_sum_over_slots(form, dtype):
    pool = make_model().retriever.pool
    slots, weights = a_route(4)
    x, output = torch.randn(4, 3, HIDDEN, dtype=dtype), torch.randn(4, 3, HIDDEN, dtype=dtype)
    a, b = (getattr(pool.task("abd"), side)["o_proj"].to(dtype) for side in "AB")
    offset = pool(slots, weights, dtype)
    for layer in range(LAYERS):
        expected = output.clone()
        for row in range(4):
            for slot, weight in zip(slots[row], weights[row].to(dtype)):
                expected[row] += SCALE * weight * (x[row] @ b[slot, layer].T) @ a[slot, layer]
        bound = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(offset.add_to(output, "o_proj", layer, x), expected, atol=bound, rtol=bound)


# -- bfloat16, wrapped projections, repeated attaching -----------------------------------------------------------------


def test_bfloat16_stays_near_float32(form):
    model = make_model()
    ids = torch.randint(3, VOCABULARY, (3, 6))
    slots, weights = a_route(3)
    full = model(ids, slot_indices=slots, slot_weights=weights).logits
    half = copy.deepcopy(model)
    half.model.to(torch.bfloat16), half.lm_head.to(torch.bfloat16)
    half.attach_adapter(half.retriever)  # a deep copy's hooks belong to the original
    assert half.retriever.pool.task("abd").A["o_proj"].dtype == torch.float32  # the slots stay exact
    logits = half(ids, slot_indices=slots, slot_weights=weights).logits
    base = half(ids, route="none").logits
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()
    effect = full - model(ids, route="none").logits
    error = ((logits - base).float() - effect).norm() / effect.norm()
    assert error < 0.1


def test_the_offset_survives_a_peft_wrapper_around_the_projection(form):
    from peft import LoraConfig, get_peft_model

    model = make_model()
    ids = torch.randint(3, VOCABULARY, (3, 6))
    slots, weights = a_route(3)
    expected = model(ids, slot_indices=slots, slot_weights=weights).logits
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"]))
    assert type(model.model.layers[0].self_attn.o_proj) is not nn.Linear
    assert torch.equal(wrapped(input_ids=ids, slot_indices=slots, slot_weights=weights).logits, expected)
    assert not torch.allclose(wrapped(input_ids=ids, route="none").logits, expected, atol=1e-3)


def test_attaching_again_does_not_double_the_offset():
    model = make_model()
    ids = torch.randint(3, VOCABULARY, (2, 6))
    slots, weights = a_route(2)
    expected = model(ids, slot_indices=slots, slot_weights=weights).logits
    pool, model.retriever = model.retriever, None
    model.attach_adapter(pool)
    assert torch.equal(model(ids, slot_indices=slots, slot_weights=weights).logits, expected)
    other = make_model(("q_proj",))
    model.attach_adapter(other.retriever)  # other targets than before
    q_only = model(ids, slot_indices=slots, slot_weights=weights).logits
    dense = dense_model(model, slots[0], weights[0])
    close(q_only[0], dense(ids[:1]).logits[0])


# -- decoding ----------------------------------------------------------------------------------------------------------


def test_prefill_and_decode_equal_the_uncached_forward(form):
    model = make_model()
    ids = torch.randint(3, VOCABULARY, (3, 9))
    slots, weights = a_route(3)
    whole = model(ids, slot_indices=slots, slot_weights=weights).logits
    with torch.no_grad():
        step = model(ids[:, :4], slot_indices=slots, slot_weights=weights, use_cache=True)
        close(step.logits, whole[:, :4])
        for place in range(4, 9):
            step = model(
                ids[:, place : place + 1],
                past_key_values=step.past_key_values,
                slot_indices=slots,
                slot_weights=weights,
                use_cache=True,
            )
            close(step.logits[:, 0], whole[:, place])


def test_left_padded_rows_generate_as_they_do_alone():
    model = make_model()
    lengths = [3, 8, 5, 8]
    ids, mask, query = torch.zeros(4, 8).long(), torch.zeros(4, 8).long(), torch.randn(4, 8)
    for row, length in enumerate(lengths):
        ids[row, 8 - length :] = torch.randint(3, VOCABULARY, (length,))
        mask[row, 8 - length :] = 1
    more = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=mask, text_query=query, **more)
    routes = model.last_route
    assert len({tuple(sorted(row.tolist())) for row in routes.slot_indices}) > 1
    for row, length in enumerate(lengths):
        alone = model.generate(ids[row : row + 1, 8 - length :], text_query=query[row : row + 1], **more)[0]
        assert together[row, : len(alone)].tolist() == alone.tolist()
        assert torch.equal(model.last_route.slot_indices[0], routes.slot_indices[row])
        assert torch.equal(model.last_route.slot_weights[0], routes.slot_weights[row])


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_follows_each_rows_route_also_with_beams(beams):
    model = make_model()
    ids, query = torch.randint(3, VOCABULARY, (3, 6)), torch.randn(3, 8)
    more = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    answers = model.generate(ids, text_query=query, **more)
    route = model.last_route
    base = dense_model(model, route.slot_indices[0], torch.zeros(TOP_K)).generate(ids, **more)
    for row in range(3):
        dense = dense_model(model, route.slot_indices[row], route.slot_weights[row])
        alone = dense.generate(ids[row : row + 1], **more)[0]
        assert answers[row, : len(alone)].tolist() == alone.tolist()
    assert answers.tolist() != base.tolist()


def test_the_offsets_are_gathered_once_an_answer(monkeypatch):
    model, calls = make_model(), []
    take = Pool._take
    monkeypatch.setattr(Pool, "_take", lambda self, *of: calls.append(of) or take(self, *of))
    model.generate(torch.randint(3, VOCABULARY, (2, 5)), text_query=torch.randn(2, 8), max_new_tokens=7, pad_token_id=0)
    assert len(calls) == 1


def test_a_route_given_to_forward_acts_as_it_is_now():
    """The same slots with other weights, after a step, and with gradients: nothing of the pass before is used."""
    model = make_model()
    ids = torch.randint(3, VOCABULARY, (2, 5))
    slots, weights = a_route(2)
    with torch.no_grad():
        before = model(ids, slot_indices=slots, slot_weights=weights).logits
        none = model(ids, slot_indices=slots, slot_weights=torch.zeros_like(weights)).logits
    torch.testing.assert_close(none, model(ids, route="none").logits)
    offsets = model.retriever.pool.task("abd").A["o_proj"].requires_grad_(True)
    model(ids, slot_indices=slots, slot_weights=weights).logits.sum().backward()
    assert offsets.grad.abs().max() > 0
    with torch.no_grad():
        offsets.mul_(2)
        assert not torch.allclose(model(ids, slot_indices=slots, slot_weights=weights).logits, before)


def test_rows_without_a_picture_route_alone_as_beside_others():
    model = make_model(vision=True)
    picture, query = torch.randn(3, 16, 16), torch.randn(2, 8)
    text_only = torch.tensor([[5, 6, 7, 8]])
    ids = torch.cat([torch.tensor([[5, IMAGE_TOKEN_INDEX, 7, 8]]), text_only])
    more = {"max_new_tokens": 4, "pad_token_id": 0}
    together = model.generate(ids, images=[picture, None], text_query=query, **more)
    routes = model.last_route
    for images in (None, [None]):
        alone = model.generate(text_only, images=images, text_query=query[1:], **more)
        assert torch.equal(model.last_route.slot_indices[0], routes.slot_indices[1])
        assert torch.equal(model.last_route.slot_weights[0], routes.slot_weights[1])
        assert together[1].tolist()[: alone.shape[1]] == alone[0].tolist()


def test_a_question_is_needed_where_the_route_depends_on_it():
    model = make_model()
    with pytest.raises(ValueError, match="give questions"):
        model.generate(torch.ones(1, 3).long(), max_new_tokens=1)
    with pytest.raises(ValueError, match="not both"):
        model.generate(torch.ones(1, 3).long(), inputs_embeds=torch.zeros(1, 3, HIDDEN))
    with pytest.raises(ValueError, match=r"2 question\(s\) for 1 prompt\(s\)"):
        model.generate(torch.ones(1, 3).long(), questions=["a", "b"], max_new_tokens=1)


@pytest.mark.slow
@pytest.mark.parametrize("targets", [pytest.param(("o_proj",), marks=pytest.mark.thorough), TARGETS])
def test_a_compiled_model_gives_the_same_logits_for_every_route(targets):
    """With routes that differ from call to call; the graphs are traced, not code-generated, which needs a compiler."""
    model = make_model(targets)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        ids, query = torch.randint(3, VOCABULARY, (3, 6)), torch.randn(3, 8)
        with torch.no_grad():
            expected = model(input_ids=ids, text_query=query).logits
            without = model(input_ids=ids, route="none").logits
            found = compiled(input_ids=ids, text_query=query).logits
        assert torch.allclose(found, expected, atol=1e-5)
        assert not torch.allclose(found, without, atol=1e-2)
    torch.compiler.reset()


@pytest.mark.parametrize("rows", [1, 3], ids=["shared", "own"])
def test_without_gradients_an_offset_goes_into_the_output_as_it_lies(rows):
    """A copy of it is a launch more at each layer; with gradients the output is left as it is."""
    down, up, x, output = (torch.randn(*size) for size in ((1, rows, 4, 6), (1, rows, 4, 5), (3, 2, 6), (3, 2, 5)))
    offset = WeightOffset({"o_proj": down}, {"o_proj": up}, torch.rand(3, 1, 4))
    kept = output.clone()
    apart = offset.add_to(output, "o_proj", 0, x)
    assert torch.equal(output, kept) and not torch.equal(apart, kept)
    with torch.no_grad():
        found = offset.add_to(output, "o_proj", 0, x)
    assert torch.equal(found, apart) and found.data_ptr() == output.data_ptr()
