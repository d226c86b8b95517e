"""The page about one evaluated run or several, and the same as Markdown and LaTeX tables.

``results`` reads what a run leaves; ``routes``, ``examples`` and ``versus`` look at it; ``tables`` and ``plots`` make
``parts`` of it, which ``sections`` and ``several`` put in order; ``writing`` writes them; ``python -m
llava.eval.report`` is the command. No metric is computed here: figures are those of ``scores.json`` and
``accuracy_matrix.json``, and of the functions that made them.
"""
