"""Caption metrics at corpus level, as pycocoevalcap 1.2 computes them: BLEU-1..4, ROUGE-L, METEOR, CIDEr.

With Java, texts go through the Stanford PTB tokenizer that pycocoevalcap ships, and METEOR is its METEOR 1.5 jar. Java
starts once per ``TextScorer`` for each of the two, however many groups and stages are scored. Without Java the texts
are tokenised by ``plain_tokens`` (named in the scores file) and METEOR is missing, with the reason.

Two things to know when reading the figures:

- METEOR and BLEU are corpus aggregates of counts, not means over rows: long answers weigh more than short ones.
- CIDEr weighs words by their rarity in the references of the group at hand, so the overall CIDEr is not the mean of
  the domains'. Its confidence interval holds those weights fixed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from llava.eval.statistics import Statistic, mean_statistic
from llava.normal_form import DIGIT, LETTER, SIGN, composed, shape_of
from llava.utils import UserError

BLEU_ORDER = 4
PTB_TOKENIZER = "PTBTokenizer (Stanford CoreNLP 3.4.1 as in pycocoevalcap, lower case, punctuation removed)"
PLAIN_TOKENIZER = (
    "plain (lower case; words of letters and digits, inner hyphen, point, slash, apostrophe and signs kept)"
)
NO_JAVA = "Java was not found; install a Java runtime (8 or newer) to have METEOR"
JAVA_OFF = "Java was switched off, and METEOR needs it"
METEOR_FAILED = "METEOR's Java process failed"
FORMULAS = {
    **{
        f"bleu_{order}": f"corpus BLEU-{order}: geometric mean of clipped 1..{order}-gram precisions times the brevity "
        "penalty"
        for order in range(1, BLEU_ORDER + 1)
    },
    "rouge_l": "ROUGE-L: mean over rows of the longest-common-subsequence F-measure, beta 1.2",
    "meteor": "METEOR 1.5 (en, -norm), corpus aggregate",
    "cider": "CIDEr: mean over rows of 10 x TF-IDF n-gram cosine (n = 1..4, sigma 6), IDF from the group's references",
}

# METEOR 1.5, English ranking weights: matcher weights (exact, stem, synonym, paraphrase) and alpha, beta, gamma, delta.
_METEOR_MATCHERS = np.array([1.0, 0.6, 0.8, 0.6])
_METEOR_ALPHA, _METEOR_BETA, _METEOR_GAMMA, _METEOR_DELTA = 0.85, 0.2, 0.6, 0.75
_METEOR_COLUMNS = 23

_PLAIN_WORD = re.compile(rf"[{LETTER}{DIGIT}]+(?:[-./'][{LETTER}{DIGIT}]+)*|\{SIGN}")


class TextScorer:
    """Tokenises and scores any number of groups with one METEOR process. ``close`` it (``contextlib.closing``).

    Args:
        use_java: None uses Java when it is there; False never does (the figures then say so).
    """

    def __init__(self, use_java: bool | None = None):
        self._java = None if use_java is False else find_java()
        if use_java and self._java is None:
            raise UserError(NO_JAVA)
        self._meteor: MeteorProcess | None = None
        self._tokens: dict[str, str] = {}
        self._meteor_rows: dict[tuple[str, str], np.ndarray] = {}
        self.tokenizer = PTB_TOKENIZER if self._java else PLAIN_TOKENIZER
        self.meteor_reason = None if self._java else JAVA_OFF if use_java is False else NO_JAVA

    def start(self) -> None:
        """Let METEOR's Java load its tables beside other work: the first group would wait for them otherwise.

        One that has ended meanwhile is started again.

        Raises:
            OSError: it cannot be started.
        """
        if self._meteor is not None and self._meteor.ended:
            self.close()
        if self._java is not None and self._meteor is None:
            self._meteor = MeteorProcess(self._java)

    def close(self) -> None:
        """End METEOR's process."""
        if self._meteor is not None:
            self._meteor.close()
            self._meteor = None

    def tokenize(self, texts: Sequence[str]) -> list[str]:
        """The texts as tokens joined by spaces, in order; a text is tokenised once, whoever asks for it again."""
        if self._java is None:
            return [" ".join(plain_tokens(text)) for text in texts]
        new = [text for text in dict.fromkeys(texts) if text not in self._tokens]
        self._tokens.update(zip(new, ptb_tokenize(new, self._java), strict=True))
        return [self._tokens[text] for text in texts]

    def statistics(self, references: Sequence[str], predictions: Sequence[str]) -> dict[str, Statistic | str]:
        """The metrics of one group of tokenised rows; a string in place of a metric says why it is missing."""
        found: dict[str, Statistic | str] = dict(bleu_statistics(references, predictions))
        found["rouge_l"] = rouge_statistic(references, predictions)
        found["meteor"] = self.meteor_reason or self._meteor_statistic(references, predictions)
        found["cider"] = cider_statistic(references, predictions)
        return found

    def _meteor_statistic(self, references: Sequence[str], predictions: Sequence[str]) -> Statistic | str:
        try:
            self.start()
            assert self._meteor is not None  # there is Java where no reason tells of its lack
            rows = self._known_rows(self._meteor, list(zip(references, predictions, strict=True)))
        except (OSError, ValueError) as error:
            self.meteor_reason = f"{METEOR_FAILED}: {error}"
            return self.meteor_reason
        return Statistic(FORMULAS["meteor"], rows, meteor_value, len(rows))

    def _known_rows(self, meteor: MeteorProcess, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Counts ``[rows, 23]``; each pair of texts is aligned once, in however many groups and files it stands."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._meteor_rows]
        if new:
            rows = meteor.rows([reference for reference, _ in new], [prediction for _, prediction in new])
            self._meteor_rows.update(zip(new, rows, strict=True))
        return np.array([self._meteor_rows[pair] for pair in pairs]).reshape(-1, _METEOR_COLUMNS)


# -- tokenisers ----------------------------------------------------------------------------------------------------


def find_java() -> str | None:
    """The path of a Java that runs, or None (macOS has a ``java`` that only says where to get one)."""
    java = shutil.which("java")
    if java is None:
        return None
    try:
        answer = subprocess.run([java, "-version"], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return java if answer.returncode == 0 else None


def plain_tokens(text: str) -> list[str]:
    """Words without Java: lower case, runs of letters, their marks and digits; an inner ``- . / '`` joins two runs.

    The same as the PTB tokenizer on plain words, numbers and hyphenated words; it does not split clitics
    (``patient's`` stays one word) or numbers from units.
    """
    lower = composed(text).lower()
    return [lower[found.start() : found.end()] for found in _PLAIN_WORD.finditer(shape_of(lower))]


def ptb_tokenize(texts: Sequence[str], java: str = "java") -> list[str]:
    """pycocoevalcap's ``PTBTokenizer`` on a list of texts: same jar, same flags, same punctuation list.

    Called directly, because the class writes into the package's own folder, which may be read-only, and loses empty
    texts at the end of the list.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, STANFORD_CORENLP_3_4_1_JAR

    lines = [" ".join(text.split()) for text in texts]
    filled = [index for index, line in enumerate(lines) if line]
    tokens = [""] * len(lines)
    if not filled:
        return tokens
    jar = _package_folder() / "tokenizer" / STANFORD_CORENLP_3_4_1_JAR
    command = [java, "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "texts.txt"
        # The last line must hold a word: a line of which nothing is kept is printed by the line after it.
        source.write_text("\n".join([*(lines[index] for index in filled), "end"]), encoding="utf-8")
        done = subprocess.run([*command, "-preserveLines", "-lowerCase", str(source)], capture_output=True, check=False)
    found = done.stdout.decode("utf-8").removesuffix("\n").split("\n")[:-1]
    if done.returncode or len(found) != len(filled):
        raise UserError(
            f"the PTB tokenizer failed (exit code {done.returncode}, {len(found)} of {len(filled)} lines): "
            f"{done.stderr.decode(errors='replace').strip()[-300:]} (check the Java installation, or use --no-java)"
        )
    for index, line in zip(filled, found, strict=True):
        tokens[index] = " ".join(word for word in line.split() if word not in PUNCTUATIONS)
    return tokens


def _package_folder() -> Path:
    spec = find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the package pycocoevalcap is missing (install it with: pip install pycocoevalcap)")
    return Path(next(iter(spec.submodule_search_locations)))


# -- metrics -------------------------------------------------------------------------------------------------------


def bleu_statistics(references: Sequence[str], predictions: Sequence[str]) -> dict[str, Statistic]:
    """``bleu_1`` .. ``bleu_4`` from summed clipped n-gram counts and lengths."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=BLEU_ORDER)
    for reference, prediction in zip(references, predictions, strict=True):
        scorer += (prediction, [reference])
    # columns: correct 1..4, guessed 1..4, length of the prediction, length of the reference
    rows = [[*row["correct"], *row["guess"], row["testlen"], row["reflen"][0]] for row in scorer.ctest]
    table = np.array(rows, dtype=np.float64).reshape(-1, 2 * BLEU_ORDER + 2)

    def order_value(order: int):
        return lambda sums: bleu_value(sums, order)

    return {
        f"bleu_{order}": Statistic(FORMULAS[f"bleu_{order}"], table, order_value(order), len(table))
        for order in range(1, BLEU_ORDER + 1)
    }


def bleu_value(sums: np.ndarray, order: int) -> np.ndarray:
    """Corpus BLEU of the given order from summed columns ``[..., 10]``, with pycocoevalcap's two small constants."""
    correct, guessed = sums[..., :order], sums[..., BLEU_ORDER : BLEU_ORDER + order]
    precision = np.prod((correct + 1e-15) / (guessed + 1e-9), axis=-1) ** (1 / order)
    length = (sums[..., -2] + 1e-15) / (sums[..., -1] + 1e-9)
    return precision * np.exp(np.minimum(0.0, 1 - 1 / length))


def rouge_statistic(references: Sequence[str], predictions: Sequence[str]) -> Statistic:
    """ROUGE-L: mean over rows of the F-measure (beta 1.2) of the longest common subsequence."""
    from pycocoevalcap.rouge.rouge import Rouge

    rouge = Rouge()
    # Two empty texts would count as a perfect match there ("".split(" ") has one, empty, token).
    values = [
        rouge.calc_score([prediction], [reference]) if prediction and reference else 0.0
        for reference, prediction in zip(references, predictions, strict=True)
    ]
    return mean_statistic(FORMULAS["rouge_l"], values)


def cider_statistic(references: Sequence[str], predictions: Sequence[str]) -> Statistic:
    """CIDEr: mean over rows of 10 x the mean over n = 1..4 of the clipped TF-IDF n-gram cosine, length penalty 6."""
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer(n=4, sigma=6.0)
    for reference, prediction in zip(references, predictions, strict=True):
        scorer += (prediction, [reference])
    scorer.compute_doc_freq()
    values = scorer.compute_cider() if references else []
    return mean_statistic(FORMULAS["cider"], values)


class MeteorProcess:
    """METEOR 1.5 as a child process (about 10 s to start); ``rows`` asks it for the alignment counts of each row."""

    def __init__(self, java: str = "java"):
        from pycocoevalcap.meteor.meteor import METEOR_JAR

        folder = _package_folder() / "meteor"
        command = [java, "-Dfile.encoding=UTF-8", "-jar", "-Xmx2G", METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"]
        # Its messages go nowhere: an unread pipe fills up and blocks it.
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
        assert self._process.stdin is not None and self._process.stdout is not None  # both are pipes
        self._questions, self._answers = self._process.stdin, self._process.stdout

    def rows(self, references: Sequence[str], predictions: Sequence[str]) -> np.ndarray:
        """Additive alignment counts ``[rows, 23]`` in METEOR's order.

        A perfect row's single chunk is left out: METEOR does not count it as fragmentation, alone or in the aggregate.

        Raises:
            OSError, ValueError: the process ended or answered something else.
        """
        found = []
        for reference, prediction in zip(references, predictions, strict=True):
            hypothesis, target = (" ".join(text.replace("|||", " ").split()) for text in (prediction, reference))
            self._questions.write(f"SCORE ||| {target} ||| {hypothesis}\n")
            self._questions.flush()
            line = self._answers.readline()
            if not line:
                raise ValueError(f"it ended with exit code {self._process.wait()}")
            counts = [float(number) for number in line.split()]
            if len(counts) != _METEOR_COLUMNS:
                raise ValueError(f"it answered {line.strip()!r}")
            found.append(counts)
        table = np.array(found, dtype=np.float64).reshape(-1, _METEOR_COLUMNS)
        perfect = (table[:, 20] == 1) & (table[:, 21] == table[:, 0]) & (table[:, 22] == table[:, 1])
        table[perfect, 20] = 0
        return table

    @property
    def ended(self) -> bool:
        """Whether it runs no more."""
        return self._process.poll() is not None

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # a line it did not live to read
            self._questions.close()
        self._answers.close()


def meteor_value(sums: np.ndarray) -> np.ndarray:
    """METEOR's aggregate from summed counts ``[..., 23]``.

    Columns: lengths (prediction, reference), function words in each, then for each of the four matchers the matched
    content words (prediction, reference) and function words (prediction, reference), then chunks and matched words.
    With ``m`` the matches weighted by matcher and by word kind (content 0.75, function 0.25), ``P`` and ``R`` the
    shares of ``m`` in the weighted lengths: ``P R / (0.85 P + 0.15 R) * (1 - 0.6 (chunks / matched)^0.2)``.
    """
    content, function = _METEOR_DELTA, 1 - _METEOR_DELTA
    counts = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)  # [..., matcher, (content p, content r, function p, r)]

    def share(side: int) -> np.ndarray:
        matched = (content * counts[..., side] + function * counts[..., side + 2]) @ _METEOR_MATCHERS
        length = content * (sums[..., side] - sums[..., side + 2]) + function * sums[..., side + 2]
        return _divide(matched, length)

    precision, recall = share(0), share(1)
    mean = _divide(precision * recall, _METEOR_ALPHA * precision + (1 - _METEOR_ALPHA) * recall)
    fragmentation = _divide(sums[..., 20], (sums[..., 21] + sums[..., 22]) / 2)
    return mean * (1 - _METEOR_GAMMA * fragmentation**_METEOR_BETA)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros(np.shape(numerator)), where=denominator > 0)
