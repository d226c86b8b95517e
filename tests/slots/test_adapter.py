"""The adapter protocol is all that a model and the answerer ask of an adapter."""

from __future__ import annotations

import pytest
import torch
from tiny_llava import HIDDEN, LAYERS, write_base, write_stage
from torch import nn

from llava.data.rows import parse_row
from llava.eval.answerer import Answerer
from llava.eval.generation import Generation, Loading
from llava.slots.adapter import ADAPTERS, Action, Adapter
from llava.slots.pool import Pool
from llava.slots.route import Route
from llava.slots.settings import RetrieverSettings


class Whisper(nn.Module):
    """One embedding in front of every prompt, and nothing of the retriever."""

    name = "whisper"
    active = True
    known_tasks: list[str] = []

    def __init__(self, pool, memory):
        super().__init__()
        self.settings = RetrieverSettings(num_layers=LAYERS, features={}, text_dim=HIDDEN, query_mode="text")
        self.encode_text, self.router_name = None, "keys"
        self.word = nn.Parameter(torch.full((1, HIDDEN), 3.0))

    def encode_questions(self, questions):
        return torch.zeros(len(questions), HIDDEN)

    def decide(self, query, tasks=None):
        return Route(torch.zeros(len(query.text), 1, dtype=torch.long), torch.ones(len(query.text), 1))

    def act(self, route, dtype):
        return Action(prefix=self.word.to(dtype).expand(len(route.slot_indices), 1, HIDDEN))


def test_an_adapter_needs_nothing_beside_the_protocol(tmp_path, monkeypatch):
    ADAPTERS.names()  # finds those that ship first
    monkeypatch.setattr(ADAPTERS, "_items", {**ADAPTERS._items, "whisper": Whisper})
    base = write_base(tmp_path / "tiny-base")
    stage = write_stage(tmp_path / "llava-whisper", base)
    pool = Pool.read(stage / "slots.pth")
    assert isinstance(Whisper(pool, {}), Adapter)
    Pool(pool.settings, pool.tasks, pool.base, adapter="whisper").write(stage / "slots.pth")
    rows = [parse_row({"question_id": n, "text": text}) for n, text in enumerate(["is it left", "where"])]
    answerer = Answerer.load(str(base), Loading(device="cpu"))
    plain = [reply.text for reply in answerer.answer(rows, Generation(max_new_tokens=5))]
    told = list(answerer.use(str(stage)).answer(rows, Generation(max_new_tokens=5)))
    assert [reply.text for reply in told] != plain and told[0].route == {"slots": [0], "weights": [1.0]}


@pytest.mark.parametrize("name", ["retriever", "l2p", "moelora"])
def test_those_that_ship_follow_it(name):
    assert all(hasattr(ADAPTERS.get(name), member) for member in ("settings", "active", "known_tasks", "decide", "act"))
