"""Caption metrics at corpus level: BLEU, ROUGE-L, METEOR, CIDEr, computed together by the ``TextScorer``."""

from __future__ import annotations

from collections.abc import Callable

from llava.data.metric_names import METRICS
from llava.eval.metrics.base import Group, Metric
from llava.eval.statistics import Statistic
from llava.eval.text_metrics import FORMULAS


def _caption(name: str) -> Callable[[Group], Statistic | str]:
    return lambda group: group.captions[name]


for _name, _formula in FORMULAS.items():
    METRICS.register(Metric(_name, _formula, _caption(_name)))
