"""Evaluations of reading, with readers whose right score is known."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest

from nestlearn.data.invented_facts import Fact, invent_facts
from nestlearn.data.invented_languages import InventedLanguage, SentencePair, in_english
from nestlearn.evals.knowledge import ask, facts_text, knowledge_incorporation
from nestlearn.evals.translation import (
    chrf,
    continual_translation,
    course_from_pairs,
    invented_course,
    lesson_lines,
)

BOOK = "It was a quiet day. " * 400


class Notebook:
    """Looks every answer up in the last ``capacity`` characters it has read."""

    def __init__(self, facts: list[Fact], capacity: int) -> None:
        self.facts, self.capacity, self.text = facts, capacity, ""

    def read(self, text: str, /) -> None:
        self.text = (self.text + text)[-self.capacity :]

    def generate(self, prompt: str, /, *, max_new_tokens: int, stop: str) -> str:
        del max_new_tokens, stop
        found = (f.value for f in self.facts if f.question == prompt and f.statement(0) in self.text)
        return f" {next(found, 'nothing').upper()}. Or so"

    def fork(self) -> Notebook:
        return copy.deepcopy(self)


class TestKnowledge:
    def test_what_is_remembered_is_counted(self) -> None:
        facts = invent_facts(people=5, seed=0)
        reader = Notebook(facts, capacity=100_000)
        result = knowledge_incorporation(reader, facts, BOOK, (0, 100, 4000))
        assert result.details["accuracy"] == [1.0, 1.0, 1.0]
        assert result.details["before"] == 0.0
        assert result.details["chance"] == pytest.approx((1 / 12 + 1 / 11 + 1 / 12) / 3)
        assert result.n == 15
        assert result.details["known"] == []
        assert reader.text == ""  # the reader given is left as it was

    def test_what_is_forgotten_is_counted(self) -> None:
        facts = invent_facts(people=5, seed=0)
        text = facts_text(facts)
        reader = Notebook(facts, capacity=len(text))
        first_wording = len(facts_text(facts, (0,)))
        half = facts_text(facts[:7], (0,))
        result = knowledge_incorporation(reader, facts, BOOK, (0, len(half), first_wording))
        assert result.details["accuracy"] == [1.0, 8 / 15, 0.0]
        assert result.value == 0.0

    def test_what_was_known_before_is_asked_for_too(self) -> None:
        facts, old = invent_facts(people=2, seed=0), invent_facts(people=2, seed=1)
        capacity = len(facts_text(old)) + len(facts_text(facts))
        reader = Notebook([*facts, *old], capacity=capacity)
        reader.read(facts_text(old))
        result = knowledge_incorporation(reader, facts, BOOK, (0, len(facts_text(old)), capacity), known=old)
        assert result.details["known"] == [1.0, 1.0, 0.0, 0.0]
        assert result.details["accuracy"] == [1.0, 1.0, 0.0]

    def test_answers_are_compared_by_their_first_word(self) -> None:
        fact = Fact("Ana", "pet", "cat")
        answers = {" Cat.\n": True, "cat": True, "cat, I think": True, "a cat": False, "": False, "catfish": False}

        class Parrot:
            answer = ""

            def generate(self, _: str, /, *, max_new_tokens: int, stop: str) -> str:
                del max_new_tokens, stop
                return self.answer

        for answer, right in answers.items():
            parrot: Any = Parrot()
            parrot.answer = answer
            assert ask(parrot, [fact]) == [right], answer

    def test_bad_requests(self) -> None:
        facts = invent_facts(people=1, seed=0)
        reader = Notebook(facts, 10)
        with pytest.raises(ValueError, match="no facts"):
            knowledge_incorporation(reader, [], BOOK)
        with pytest.raises(ValueError, match="increasing order"):
            knowledge_incorporation(reader, facts, BOOK, (100, 10))
        with pytest.raises(ValueError, match="has 3 characters, the last length asks for 10"):
            knowledge_incorporation(reader, facts, "abc", (0, 10))


class Student:
    """Knows how to translate the languages whose lessons were among its last ``capacity`` courses."""

    def __init__(self, languages: dict[str, InventedLanguage], lessons: dict[str, str], capacity: int) -> None:
        self.languages, self.lessons, self.capacity, self.known = languages, lessons, capacity, []

    def read(self, text: str, /) -> None:
        name = next(name for name, lessons in self.lessons.items() if lessons == text)
        self.known = [*self.known, name][-self.capacity :]

    def generate(self, prompt: str, /, *, max_new_tokens: int, stop: str) -> str:
        del max_new_tokens, stop
        for name in self.known:
            try:
                return in_english(self.languages[name].understand(prompt.removesuffix(" =")))
            except ValueError:
                continue
        return "?"

    def fork(self) -> Student:
        return copy.copy(self)


class TestTranslation:
    @pytest.mark.parametrize(("capacity", "after_two"), [(2, [100.0, 100.0]), (1, [0.0, 100.0])])
    def test_the_matrix_tells_what_was_forgotten(self, capacity: int, after_two: list[float]) -> None:
        courses = [invented_course(seed, sentences=20, exam=6) for seed in (1, 2)]
        languages = {course.name: InventedLanguage.invent(seed) for seed, course in zip((1, 2), courses, strict=True)}
        student = Student(languages, {course.name: course.lessons for course in courses}, capacity)
        result = continual_translation(student, courses)
        assert result.details["chrf"][0] == pytest.approx([0.0, 0.0], abs=1e-9)
        assert result.details["chrf"][1][0] == pytest.approx(100.0)
        assert result.details["chrf"][2] == pytest.approx(after_two)
        assert result.details["alone"] == pytest.approx([100.0, 100.0])
        assert result.details["exact"][2] == [value / 100 for value in after_two]
        assert result.value == pytest.approx(sum(after_two) / 2)
        assert student.known == []

    def test_something_else_can_be_asked_and_the_courses_alone_left_out(self) -> None:
        courses = [invented_course(seed, sentences=20, exam=6) for seed in (1, 2)]
        languages = {course.name: InventedLanguage.invent(seed) for seed, course in zip((1, 2), courses, strict=True)}
        student = Student(languages, {course.name: course.lessons for course in courses}, 2)
        result = continual_translation(
            student, courses, alone=False, probe=lambda reader: float(len(cast(Student, reader).known))
        )
        assert result.details["probe"] == [0.0, 1.0, 2.0]
        assert result.details["alone"] == pytest.approx([100.0])

    def test_no_exam_sentence_is_in_the_lessons(self) -> None:
        course = invented_course(seed=4, sentences=300, exam=50)
        assert not any(lesson_lines([pair]) in course.lessons for pair in course.exam)
        assert course.lessons.count("\n") == 300 + len(InventedLanguage.invent(4).dictionary())

    def test_chrf_is_sacrebleus(self) -> None:
        assert chrf(["the dog helps"], ["the dog helps"]) == pytest.approx(100)
        assert 0 < chrf(["the dog"], ["the dog helps"]) < 100

    def test_bad_requests(self) -> None:
        pair = SentencePair("a", "b")
        with pytest.raises(ValueError, match="no sentence in its exam"):
            course_from_pairs("x", [pair], [])
        with pytest.raises(ValueError, match="1 sentences of the course 'x' are in its lessons and its exam, e.g. 'a'"):
            course_from_pairs("x", [pair], [pair])
        with pytest.raises(ValueError, match="exam=0"):
            invented_course(0, exam=0)
        with pytest.raises(ValueError, match="no courses"):
            continual_translation(Notebook([], 1), [])
