"""Invented languages and facts: unambiguous, deterministic, and nothing of an exam in the lessons."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest

from nestlearn.data.invented_facts import RELATIONS, invent_facts
from nestlearn.data.invented_languages import (
    ADJECTIVES,
    NOUNS,
    VERBS,
    InventedLanguage,
    Meaning,
    NounPhrase,
    in_english,
)
from nestlearn.data.parallel_text import load_pairs

SENTENCE = Meaning(NounPhrase("king", "old"), "follow", NounPhrase("bird", None, plural=True), past=True)


class TestLanguages:
    @pytest.mark.parametrize("seed", range(12))
    def test_every_sentence_has_one_meaning(self, seed: int) -> None:
        language = InventedLanguage.invent(seed)
        for foreign, english in islice(language.pairs(seed=1), 200):
            assert in_english(language.understand(foreign)) == english

    def test_orders_of_words_all_occur_and_are_kept(self) -> None:
        languages = [InventedLanguage.invent(seed) for seed in range(40)]
        assert {language.order for language in languages} == {"SVO", "SOV", "VSO", "VOS", "OSV", "OVS"}
        for language in languages[:10]:
            words = language.say(SENTENCE).split()
            stems = {"S": language.lexicon["king"], "V": language.lexicon["follow"], "O": language.lexicon["bird"]}
            places = [next(i for i, word in enumerate(words) if stems[part] in word) for part in language.order]
            assert places == sorted(places)
            adjective = words.index(language.lexicon["old"])
            assert (adjective < words.index(stems["S"])) == language.adjective_first

    def test_affixes_mark_plural_and_past(self) -> None:
        language = InventedLanguage.invent(3)
        now = language.say(SENTENCE._replace(past=False)).split()
        then = language.say(SENTENCE).split()
        changed = [(a, b) for a, b in zip(now, then, strict=True) if a != b]
        stem = language.lexicon["follow"]
        assert changed == [(stem, stem + language.past if language.suffixing else language.past + stem)]

    def test_english_is_written_out(self) -> None:
        assert in_english(SENTENCE) == "the old king followed the birds"
        assert in_english(SENTENCE._replace(past=False)) == "the old king follows the birds"
        many = SENTENCE._replace(subject=NounPhrase("boy", None, plural=True), past=False)
        assert in_english(many) == "the boys follow the birds"

    def test_seeds_decide_everything(self) -> None:
        one, same, other = (InventedLanguage.invent(seed) for seed in (5, 5, 6))
        assert one == same
        assert one.lexicon != other.lexicon
        first = [pair.english for pair in islice(one.pairs(seed=2), 50)]
        assert first == [pair.english for pair in islice(other.pairs(seed=2), 50)]
        assert len(set(first)) == 50
        assert not set(first) & {pair.english for pair in islice(one.pairs(seed=2, without=first), 50)}

    def test_dictionary_has_every_form_once(self) -> None:
        entries = InventedLanguage.invent(0).dictionary()
        assert len(entries) == 2 * (len(NOUNS) + len(VERBS)) + len(ADJECTIVES)
        assert len({entry.foreign for entry in entries}) == len(entries) == len({entry.english for entry in entries})

    def test_what_is_not_the_language_is_refused(self) -> None:
        language = InventedLanguage.invent(0)
        words = language.say(SENTENCE).split()
        with pytest.raises(ValueError, match="'xyzzy' is not a word"):
            language.understand("xyzzy " + " ".join(words))
        with pytest.raises(ValueError, match="order is"):
            language.understand(" ".join([*words, words[0]]))
        with pytest.raises(ValueError, match="two forms of words are equal"):
            replace(language, lexicon=language.lexicon | {"dog": language.lexicon["bird"]})
        with pytest.raises(ValueError, match="differs in .*'cat'"):
            replace(language, lexicon=language.lexicon | {"cat": "miau"})


class TestFacts:
    def test_facts_are_deterministic_and_about_different_people(self) -> None:
        facts = invent_facts(people=20, seed=4)
        assert facts == invent_facts(people=20, seed=4) != invent_facts(people=20, seed=5)
        assert len({fact.name for fact in facts}) == 20
        assert [fact.relation for fact in facts[:3]] == list(RELATIONS)

    def test_statements_have_the_answer_and_questions_do_not(self) -> None:
        for fact in invent_facts(people=10, seed=0):
            assert all(fact.name in text and fact.value in text for text in (fact.statement(0), fact.statement(1)))
            assert fact.name in fact.question
            assert fact.value not in fact.question
            assert fact.value in fact.choices

    def test_bad_requests(self) -> None:
        with pytest.raises(ValueError, match="people=0 must be at least 1"):
            invent_facts(people=0, seed=0)
        with pytest.raises(ValueError, match="unknown relation 'age'; use place"):
            invent_facts(people=1, seed=0, relations=["age"])


class TestParallelText:
    def test_json_without_its_canary(self, tmp_path: Path) -> None:
        entries = [
            {"canary": "do not train on this"},
            {"original": " kal ", "ground_truth": "fish"},
            {"original": "ma", "ground_truth": ""},
        ]
        file = tmp_path / "test.json"
        file.write_text(json.dumps(entries))
        assert load_pairs(file) == [("kal", "fish")]

    def test_tables_by_column(self, tmp_path: Path) -> None:
        file = tmp_path / "pairs.csv"
        file.write_text('Manchu,English,page\nemu,"one, single",1\njuwe,two,2\n')
        assert load_pairs(file) == [("emu", "one, single"), ("juwe", "two")]
        assert load_pairs(file, foreign="English", english="page") == [("one, single", "1"), ("two", "2")]

    def test_a_named_column_is_not_taken_for_the_other(self, tmp_path: Path) -> None:
        file = tmp_path / "pairs.csv"
        file.write_text("source,target\na,b\n")
        assert load_pairs(file, foreign="target", english="source") == [("b", "a")]
        with pytest.raises(ValueError, match="both 'source'; name two columns"):
            load_pairs(file, foreign="source", english="source")

    def test_lines_of_json(self, tmp_path: Path) -> None:
        file = tmp_path / "pairs.jsonl"
        file.write_text('{"source": "a", "target": "b"}\n\n{"source": "c", "target": "d"}\n')
        assert load_pairs(file) == [("a", "b"), ("c", "d")]

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("a.txt", "x = y", "convert it"),
            ("a.json", "{", "not valid JSON"),
            ("a.json", "{}", "a list of objects"),
            ("a.csv", "one,two\n1,2\n", "has the columns one, two; name the right one"),
            ("a.csv", "source,target\n ,\n", "no entry with text in both"),
        ],
    )
    def test_bad_files(self, tmp_path: Path, name: str, text: str, message: str) -> None:
        file = tmp_path / name
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_pairs(file)

    def test_a_missing_file_and_column(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cannot be read"):
            load_pairs(tmp_path / "none.csv")
        (tmp_path / "a.csv").write_text("source,target\na,b\n")
        with pytest.raises(ValueError, match="no column 'left'; it has source, target"):
            load_pairs(tmp_path / "a.csv", foreign="left")
