"""Continual translation of new languages (NL section 8.2, after MTOB): learn one, then another, then translate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from nestlearn.continual.readers import Reader
from nestlearn.data.invented_languages import InventedLanguage, SentencePair
from nestlearn.evals.result import EvalResult


@dataclass(frozen=True)
class Course:
    """The lessons and the exam of one language.

    Attributes:
        name: of the language.
        lessons: the text to read.
        exam: sentences to translate into English, none of them in the lessons.
    """

    name: str
    lessons: str
    exam: tuple[SentencePair, ...]


def translation_prompt(foreign: str) -> str:
    """The prompt; its continuation, up to the end of the line, is the translation.

    It ends before the space, which tokenizers join to the next word.
    """
    return f"{foreign} ="


def lesson_lines(pairs: Sequence[SentencePair]) -> str:
    """Sentences with translations, one pair per line, in the form of `translation_prompt`."""
    return "".join(f"{translation_prompt(pair.foreign)} {pair.english}\n" for pair in pairs)


def invented_course(
    seed: int, sentences: int = 200, exam: int = 50, dictionary: bool = True, repeats: int = 1
) -> Course:
    """A course in `InventedLanguage.invent(seed)`: its dictionary, then example sentences.

    Args:
        seed: of the language and of the sentences.
        sentences: in the lessons.
        exam: sentences of the exam.
        dictionary: whether the lessons begin with every word and its translation.
        repeats: times the lessons are repeated.

    Raises:
        ValueError: an exam without sentences, or no lessons.

    Example:
        >>> course = invented_course(seed=3, sentences=10, exam=5)
        >>> len(course.exam), course.lessons.count("=") > 10
        (5, True)
    """
    if exam < 1 or repeats < 1 or sentences < 0 or not (sentences or dictionary):
        raise ValueError(
            f"{exam=} must be at least 1 sentence, {repeats=} at least 1, and {sentences=} at least 0 (1 without the "
            "dictionary)."
        )
    language = InventedLanguage.invent(seed)
    drawn = list(islice(language.pairs(seed), sentences + exam))
    words = lesson_lines(language.dictionary()) if dictionary else ""
    return Course(f"invented {seed}", repeats * (words + lesson_lines(drawn[:sentences])), tuple(drawn[sentences:]))


def course_from_pairs(name: str, lessons: Sequence[SentencePair], exam: Sequence[SentencePair]) -> Course:
    """A course from real sentences (`nestlearn.data.parallel_text.load_pairs`).

    Raises:
        ValueError: no exam, or an exam sentence that is also in the lessons.
    """
    if not exam:
        raise ValueError(f"the course {name!r} has no sentence in its exam; give at least one.")
    both = {pair.foreign for pair in lessons} & {pair.foreign for pair in exam}
    if both:
        raise ValueError(
            f"{len(both)} sentences of the course {name!r} are in its lessons and its exam, e.g. {min(both)!r}; "
            "take them out of one."
        )
    return Course(name, lesson_lines(lessons), tuple(exam))


def chrf(translations: Sequence[str], references: Sequence[str]) -> float:
    """Corpus ChRF of sacrebleu, 0 to 100 (character n-grams up to 6, beta 2).

    Raises:
        ImportError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise ImportError("ChRF needs sacrebleu: pip install 'nestlearn[continual]'.") from error
    return CHRF().corpus_score(list(translations), [list(references)]).score


def examine(reader: Reader, course: Course, max_new_tokens: int = 64) -> tuple[float, float]:
    """ChRF and the share of exactly right translations, one sentence after the other."""
    asked = [
        reader.generate(translation_prompt(pair.foreign), max_new_tokens=max_new_tokens, stop="\n")
        for pair in course.exam
    ]
    translations = [text.strip() for text in asked]
    references = [pair.english for pair in course.exam]
    exact = sum(a == b for a, b in zip(translations, references, strict=True)) / len(references)
    return chrf(translations, references), exact


def continual_translation(
    reader: Reader,
    courses: Sequence[Course],
    *,
    max_new_tokens: int = 64,
    alone: bool = True,
    probe: Callable[[Reader], float] | None = None,
    seed: int = 0,
    command: str = "",
    progress: Callable[[str], None] = lambda _: None,
) -> EvalResult:
    """Study the courses one after the other; after each, take the exams of all.

    The matrix ``chrf[i][j]`` is the score in language j after course i; row 0 is before any course.
    ``details["alone"]`` has the score of each language when its course is the only one; its difference to the last row
    is the cost of the sequence. ``details["probe"]`` has the results of `probe` before the first course and after each.

    Args:
        reader: any `Reader`; it does not change.
        courses: in the order of study.
        max_new_tokens: the longest translation.
        alone: whether later courses are also studied alone, which takes their time again.
        probe: a score of something else, such as earlier knowledge; it gets a copy of the reader.
        seed: recorded.
        command: recorded; repeats the evaluation.
        progress: called with each score.

    Returns:
        Mean ChRF over languages after the last course.

    Raises:
        ValueError: no courses.
    """
    if not courses:
        raise ValueError("there are no courses to study; make some with invented_course(seed).")
    started = time.perf_counter()
    details = _study(reader, courses, max_new_tokens, alone, probe, progress)
    n = sum(len(course.exam) for course in courses)
    return EvalResult(
        task="continual_translation",
        version=1,
        metric="ChRF",
        value=sum(details["chrf"][-1]) / len(courses),
        stderr=None,
        n=n,
        seed=seed,
        seconds=time.perf_counter() - started,
        command=command,
        config={"courses": [course.name for course in courses], "max_new_tokens": max_new_tokens},
        details=details,
    )


def _study(
    reader: Reader,
    courses: Sequence[Course],
    max_new_tokens: int,
    by_themselves: bool,
    probe: Callable[[Reader], float] | None,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """ChRF and exact shares of every exam before and after each course, and ChRF of each language alone."""
    matrix: list[list[float]] = []
    exact: list[list[float]] = []
    alone: list[float] = []
    probed: list[float] = []

    def take_exams(studied: Reader, label: str) -> None:
        scores = [examine(studied.fork(), course, max_new_tokens) for course in courses]
        matrix.append([score for score, _ in scores])
        exact.append([share for _, share in scores])
        if probe is not None:
            probed.append(probe(studied.fork()))
        shown = (f"{course.name} {value:.1f}" for course, (value, _) in zip(courses, scores, strict=True))
        progress(f"{label}: ChRF {', '.join(shown)}")

    take_exams(reader, "before any course")
    studying = reader.fork()
    for number, course in enumerate(courses):
        if number and by_themselves:
            only = reader.fork()
            only.read(course.lessons)
            alone.append(examine(only, course, max_new_tokens)[0])
        studying.read(course.lessons)
        take_exams(studying, f"after course {number + 1}")
        if not number:
            # The first course is alone: nothing was studied before it.
            alone.append(matrix[1][0])
    return {"chrf": matrix, "exact": exact, "alone": alone} | ({} if probe is None else {"probe": probed})
