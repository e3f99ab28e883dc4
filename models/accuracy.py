"""How right a model's answers are, task by task, on a labelled set. Pure: no I/O, no clock.

Sources: SQuAD's exact match and F1 (Rajpurkar 2016), word error rate (Levenshtein over words), chrF (Popovic 2015,
up to 6 letters, beta 2), Spearman's rank correlation with mean ranks for ties, F1 of boxes that overlap by half
(PASCAL VOC).
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Final

from models.errors import ModelError

Scores = dict[str, float]
"""Measures by name; the first is the one that decides."""

Pairs = Sequence[tuple[Any, Any]]
"""(what the model answered under `outputs`, what is right)."""

ERRORS: Final = frozenset({"mae", "rmse", "word_error_rate"})
"""Measures of which less is better."""
IN_UNITS: Final = frozenset({"mae", "rmse"})
"""Errors in the units of the data, so that only their growth can be judged."""

_ORDER: Final = 6
_BETA: Final = 2.0
_OVERLAP: Final = 0.5
_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
_SPACE: Final = re.compile(r"\s+")


def score(task: str, pairs: Pairs) -> Scores:
    """Return a task's measures over all pairs; raises ModelError for a task or a label that cannot be judged."""
    judge = _JUDGES.get(task)
    if judge is None:
        raise ModelError(f"{task} has no measure here; golden samples alone judge it")
    if not pairs:
        raise ModelError("the set has no labelled samples")
    try:
        return {name: round(value, 6) for name, value in judge(pairs).items()}
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise ModelError(f"a label is not what {task} answers: {type(error).__name__}: {error}") from error


def is_better(measure: str, value: float, than: float) -> bool:
    """Whether a measure's value is the better one."""
    return value < than if measure in ERRORS else value > than


def drop(measure: str, value: float, reference: float) -> float:
    """Return how much worse a value is than the reference: in shares as they are, errors in units by their growth."""
    if measure in IN_UNITS:
        return (value - reference) / reference if reference else math.inf if value else 0.0
    return value - reference if measure in ERRORS else reference - value


def macro_f1(pairs: Sequence[tuple[Hashable, Hashable]]) -> float:
    """Return the mean of every true label's F1."""
    counts = {label: [0, 0, 0] for _, label in pairs}
    for answered, label in pairs:
        counts[label][0] += answered == label
        counts[label][2] += 1
        if answered in counts:
            counts[answered][1] += 1
    return _mean([_f1(hits, given, wanted) for hits, given, wanted in counts.values()])


def word_error_rate(pairs: Sequence[tuple[str, str]]) -> float:
    """Return edits of words over the words that are right."""
    edits = sum(edit_distance(answered.split(), right.split()) for answered, right in pairs)
    return edits / max(1, sum(len(right.split()) for _, right in pairs))


def chrf(answered: str, right: str) -> float:
    """Return the F score, 0 to 1, of runs of 1 to 6 letters, recall counting double; spaces do not count."""
    precisions, recalls = [], []
    for order in range(1, _ORDER + 1):
        given, wanted = _runs(answered, order), _runs(right, order)
        if not given and not wanted:
            continue
        shared = (given & wanted).total()
        precisions.append(shared / max(1, given.total()))
        recalls.append(shared / max(1, wanted.total()))
    if not precisions:
        return 1.0
    precision, recall = _mean(precisions), _mean(recalls)
    weighted = _BETA**2 * precision + recall
    return (1 + _BETA**2) * precision * recall / weighted if weighted else 0.0


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Return the correlation of ranks, -1 to 1; 0 where one side does not vary."""
    return _pearson(_ranks([left for left, _ in pairs]), _ranks([right for _, right in pairs]))


def edit_distance(left: Sequence[Hashable], right: Sequence[Hashable]) -> int:
    """Return the fewest insertions, deletions and replacements between two sequences."""
    row = list(range(len(right) + 1))
    for at, wanted in enumerate(left, 1):
        before, row[0] = row[0], at
        for to, given in enumerate(right, 1):
            before, row[to] = row[to], min(row[to] + 1, row[to - 1] + 1, before + (wanted != given))
    return row[-1]


def _classes(pairs: Pairs) -> Scores:
    named = [(_best(outputs), str(label)) for outputs, label in pairs]
    return {"accuracy": _mean([answered == label for answered, label in named]), "macro_f1": macro_f1(named)}


def _best(outputs: Any) -> str:
    return str((outputs[0] if isinstance(outputs, list) else outputs)["label"])


def _numbers(pairs: Pairs) -> Scores:
    errors = [
        got - float(want) for outputs, label in pairs for got, want in zip(_flat(outputs), _flat(label), strict=True)
    ]
    return {"mae": _mean([abs(error) for error in errors]), "rmse": math.sqrt(_mean([error**2 for error in errors]))}


def _tensors(pairs: Pairs) -> Scores:
    return _numbers([([output["data"] for output in outputs], label) for outputs, label in pairs])


def _entities(pairs: Pairs) -> Scores:
    """Judge entities by (start, end, kind), a label being a list of such or of objects."""
    hits = given = wanted = 0
    for outputs, label in pairs:
        found, right = {_entity(one) for one in outputs}, {_entity(one) for one in label}
        hits, given, wanted = hits + len(found & right), given + len(found), wanted + len(right)
    return {"entity_f1": _f1(hits, given, wanted), "precision": hits / max(1, given), "recall": hits / max(1, wanted)}


def _entity(value: Any) -> tuple[int, int, str]:
    if isinstance(value, Mapping):
        return int(value["start"]), int(value["end"]), str(value.get("entity_group", value.get("entity")))
    start, end, kind = value
    return int(start), int(end), str(kind)


def _answers(pairs: Pairs) -> Scores:
    best = [
        max(
            (_squad(str(outputs["answer"]), str(right)) for right in _several(label)),
            key=lambda found: (found[1], found),
        )
        for outputs, label in pairs
    ]
    return {"f1": _mean([found[1] for found in best]), "exact_match": _mean([found[0] for found in best])}


def _squad(answered: str, right: str) -> tuple[float, float]:
    given, wanted = _plain(answered).split(), _plain(right).split()
    shared = (Counter(given) & Counter(wanted)).total()
    f1 = _f1(shared, len(given), len(wanted)) if given and wanted else float(given == wanted)
    return float(given == wanted), f1


def _plain(text: str) -> str:
    """Return a text as SQuAD compares it: in lower case, without articles, punctuation and further spaces."""
    bare = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return _SPACE.sub(" ", _ARTICLES.sub(" ", bare)).strip()


def _speech(pairs: Pairs) -> Scores:
    texts = [(_written(outputs).lower(), str(label).lower()) for outputs, label in pairs]
    exact = _mean([answered.split() == right.split() for answered, right in texts])
    return {"word_error_rate": word_error_rate(texts), "exact_match": exact}


def _texts(pairs: Pairs) -> Scores:
    best = [
        (max(chrf(_written(outputs), right) for right in _several(label)), _written(outputs) in _several(label))
        for outputs, label in pairs
    ]
    return {"chrf": _mean([found for found, _ in best]), "exact_match": _mean([exact for _, exact in best])}


def _written(outputs: Any) -> str:
    one = outputs[0] if isinstance(outputs, list) else outputs
    return str(one if isinstance(one, str) else next(iter(one.values())))


def _likeness(pairs: Pairs) -> Scores:
    """Judge embeddings by pairs of texts, a label saying how alike they are."""
    return {"spearman": spearman([(_cosine(outputs), float(label)) for outputs, label in pairs])}


def _cosine(outputs: Any) -> float:
    left, right = outputs
    product = sum(one * other for one, other in zip(left, right, strict=True))
    lengths = math.sqrt(sum(one * one for one in left) * sum(one * one for one in right))
    return product / lengths if lengths else 0.0


def _boxes(pairs: Pairs) -> Scores:
    hits = given = wanted = 0
    for outputs, label in pairs:
        hits += _matched(outputs, label)
        given, wanted = given + len(outputs), wanted + len(label)
    return {"box_f1": _f1(hits, given, wanted), "precision": hits / max(1, given), "recall": hits / max(1, wanted)}


def _matched(found: Sequence[Any], right: Sequence[Any]) -> int:
    """Return how many boxes lie on one of the same label, each taken once, the surest first."""
    left = list(right)
    hits = 0
    for box in sorted(found, key=lambda box: -float(box.get("score", 1))):
        same = [one for one in left if one["label"] == box["label"]]
        best = max(same, key=lambda one: _overlap(one["box"], box["box"]), default=None)
        if best is not None and _overlap(best["box"], box["box"]) >= _OVERLAP:
            left.remove(best)
            hits += 1
    return hits


def _overlap(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Return the shared area of two boxes over that of both."""
    width = min(one["xmax"], other["xmax"]) - max(one["xmin"], other["xmin"])
    height = min(one["ymax"], other["ymax"]) - max(one["ymin"], other["ymin"])
    shared = max(0.0, width) * max(0.0, height)
    both = sum((box["xmax"] - box["xmin"]) * (box["ymax"] - box["ymin"]) for box in (one, other)) - shared
    return shared / both if both > 0 else 0.0


def _several(label: Any) -> list[str]:
    return [str(one) for one in label] if isinstance(label, list) else [str(label)]


def _flat(value: Any) -> list[float]:
    if isinstance(value, list):
        return [number for one in value for number in _flat(one)]
    return [float(value)]


def _runs(text: str, order: int) -> Counter[str]:
    letters = _SPACE.sub("", text)
    return Counter(letters[at : at + order] for at in range(len(letters) - order + 1))


def _ranks(values: Sequence[float]) -> list[float]:
    """Return each value's rank, equal values sharing the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    at = 0
    while at < len(order):
        end = at
        while end < len(order) and values[order[end]] == values[order[at]]:
            end += 1
        for number in order[at:end]:
            ranks[number] = (at + end - 1) / 2
        at = end
    return ranks


def _pearson(left: Sequence[float], right: Sequence[float]) -> float:
    middle, other = _mean(left), _mean(right)
    shared = sum((one - middle) * (two - other) for one, two in zip(left, right, strict=True))
    spread = math.sqrt(sum((one - middle) ** 2 for one in left) * sum((two - other) ** 2 for two in right))
    return shared / spread if spread else 0.0


def _f1(hits: float, given: float, wanted: float) -> float:
    return 2 * hits / (given + wanted) if given + wanted else 1.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


_JUDGES: Final[dict[str, Callable[[Pairs], Scores]]] = {
    **dict.fromkeys(
        ("text-classification", "image-classification", "audio-classification", "tabular-classification"), _classes
    ),
    **dict.fromkeys(("tabular-regression", "time-series-forecasting"), _numbers),
    **dict.fromkeys(("translation", "summarization", "text-generation"), _texts),
    "token-classification": _entities,
    "question-answering": _answers,
    "automatic-speech-recognition": _speech,
    "feature-extraction": _likeness,
    "object-detection": _boxes,
    "tensors": _tensors,
}
