"""The page about one evaluated run or several, and the same as Markdown and LaTeX tables.

``results`` reads what a run leaves; ``routes``, ``examples`` and ``versus`` look at it; ``tables``, ``plots`` and
``sections`` say what is shown; ``writing`` writes it; ``python -m llava.eval.report`` is the command. No metric is
computed here: figures are those of ``scores.json`` and ``accuracy_matrix.json``, and of the functions that made them.
"""
