"""Curation: rules, duplicates, overlap, hacks, difficulty and balance; every problem has exactly one fate."""

import pytest

from bregman.config import parse
from bregman.errors import RecipeError
from bregman.types import Group, Problem, Segment, Trajectory
from samplers.curation import Curation, domain_sizes, evenly
from samplers.curation_config import CurationConfig, DomainsConfig, RulesConfig
from samplers.curation_overlap import near_duplicates, overlaps, shingles
from samplers.curation_rules import broken_rule, domain, most_hits

BASE = {"problems": {"kind": "jsonl", "path": "p"}, "sampling": {"max_tokens": 8}}


def config(**changes):
    return parse(CurationConfig, {**BASE, **changes}, "recipe")


def problem(identity, text, answer=None, **columns):
    message = {"role": "user", "content": text}
    return Problem(id=identity, messages=(message,), prompt_ids=(1,), answer=answer, columns={"prompt": text, **columns})


def group(of, *scores):
    trajectories = tuple(
        Trajectory(
            problem_id=of.id,
            sample_index=index,
            token_ids=(1, 2),
            logprobs=(),
            segments=(Segment(policy_version=0, length=2),),
            finish_reason="stop",
            text="",
            reward=score,
            reward_parts={"right": score},
            reward_error="" if score is not None else "reward `right` timed out",
        )
        for index, score in enumerate(scores)
    )
    return Group(problem=of, trajectories=trajectories)


@pytest.mark.parametrize(
    ("rule", "text", "answer", "columns"),
    [
        ("multiple_choice", "Pick x.\n(A) 1\n(B) 2\n(C) 3\n(D) 4", "B", {}),
        ("multiple_choice", "What is 1+1? A. one B. two C. three", "B", {}),
        ("multiple_choice", "Which of the following is prime: 4, 7, 8?", "7", {}),
        ("multiple_choice", "What is it?", "cat", {"choices": ["cat", "dog"]}),
        ("true_false", "True or false: 7 is prime.", "true", {}),
        ("true_false", "Is 7 a prime number?", "Yes", {}),
        ("proof", "Prove that the square root of 2 is irrational.", None, {}),
        ("proof", "Show that n^2 + n is even.", None, {}),
        (None, "Find the area of triangle ABC with AB = 3, BC = 4 and a right angle at B.", "6", {}),
        (None, "A bag has a. red and b. blue marbles; how many in all if a = 3 and b = 4?", "7", {}),
        (None, "1. Add 2 and 3. 2. Double it. 3. What do you get?", "10", {}),
        (None, "How many zeros has 10! at its end?", "2", {}),
        (None, "A proofreader reads 12 pages an hour; how long does she need for 60?", "5", {}),
    ],
)
def test_rules(rule, text, answer, columns):
    found = broken_rule(problem("p", text, answer, **columns), RulesConfig())
    assert (found and found[0]) == rule


def test_own_rules_and_rules_switched_off():
    p = problem("p", "Prove that a = b. Sketch it.")
    assert broken_rule(p, RulesConfig(drop=[], own={"drawing": "sketch"})) == ("drawing", "Sketch")
    assert broken_rule(p, RulesConfig(drop=["true_false"])) is None


def test_domains_are_the_datas_own_or_told_by_keywords():
    domains = DomainsConfig()
    assert domain(problem("p", "the triangle", domain="art"), domains) == "art"
    assert domain(problem("p", "A triangle has a right angle; is the radius prime?"), domains) == "geometry"
    assert domain(problem("p", "Hm."), domains) == "other"
    assert most_hits("b a a", {"x": ["a"], "y": ["b"]}) == "x"


LONG = "Find the sum of all positive whole numbers below one hundred that three or five divide, as a plain number without any units"


def test_near_duplicates_are_found_once_and_later_ones_go():
    texts = [
        LONG,
        "Something else entirely, about a train that leaves at noon",
        LONG.replace("plain", "single"),
        LONG.upper(),
        "What is 3+5?",
        "What is 3+6?",
    ]
    found = near_duplicates([shingles(text, 3) for text in texts], 0.7)
    assert {index: other for index, (other, _) in found.items()} == {2: 0, 3: 0}
    assert found[3][1] == 1.0
    assert near_duplicates([shingles(text, 3) for text in texts], 1.0).keys() == {3}


def test_minhash_misses_no_pair_above_the_threshold():
    words = [f"w{number}" for number in range(120)]
    texts = []
    for number in range(60):
        own = [f"{word}_{number}" for word in words]
        texts += [" ".join(own), " ".join([*own[:118], "x", "y"])]
    found = near_duplicates([shingles(text, 5) for text in texts], 0.8)
    assert found.keys() == set(range(1, 120, 2))


def test_the_same_words_under_another_picture_are_another_problem():
    texts = [shingles(LONG, 5, images=["a"]), shingles(LONG, 5, images=["b"]), shingles(LONG, 5, images=["a"])]
    assert near_duplicates(texts, 0.8).keys() == {2}


def test_overlap_counts_the_share_of_the_problem():
    held_out = [shingles("unrelated words in a row here", 3), shingles(LONG, 3)]
    texts = [
        shingles(" ".join(LONG.split()[:12]), 3),
        shingles(LONG + " " + " ".join(f"w{n}" for n in range(40)), 3),
        shingles("a b c d e", 3),
    ]
    assert overlaps(texts, held_out, 0.5).keys() == {0}
    assert overlaps(texts, held_out, 0.3).keys() == {0, 1}


def test_every_problem_ends_in_one_fate_and_the_counts_add_up():
    settings = config(min_pass_rate=0.1, max_pass_rate=0.9, domains={"keywords": {"cats": ["cat"]}, "max_per_domain": 2})
    texts = {
        "proof": "Prove that cats purr.",
        "twin": LONG,
        "twin2": LONG + "?",
        "held": "How many apples are left when seven of the twelve are eaten by horses in the rain",
        "hacked": "one",
        "failed": "two",
        "hard": "three",
        "easy": "four",
        **{f"cat{number}": f"cat {number}" for number in range(5)},
    }
    problems = [problem(identity, text, answer="1", extra=identity) for identity, text in texts.items()]
    curation = Curation(problems, settings)
    curation.apply_rules()
    curation.drop_duplicates([problem("e", texts["held"])], {})
    assert {p.id for p in curation.left()} == set(texts) - {"proof", "twin2", "held"}
    for p in curation.left():
        curation.observe_hack(group(p, *[float(p.id == "hacked")] * 8))
    scores = {
        "failed": [None, None],
        "hard": [0.0, 0.0],
        "easy": [1.0, 1.0, None],
        **{f"cat{n}": [1.0] + [0.0] * (n + 1) for n in range(5)},
    }
    for p in curation.left():
        curation.observe_difficulty(group(p, *scores.get(p.id, [1.0, 0.0])))
    curation.balance()

    report = curation.report()
    assert sum(report["fates"].values()) == report["problems"] == len(texts)
    dropped = {fate: count for fate, count in report["fates"].items() if count}
    assert dropped == {
        "proof": 1,
        "near_duplicate": 1,
        "evaluation_overlap": 1,
        "easy_to_hack": 1,
        "reward_failed": 1,
        "too_hard": 1,
        "too_easy": 1,
        "balance": 3,
        "kept": 3,
    }
    rows = {row["id"]: row for row in curation.rows()}
    assert set(rows) == {"twin", "cat0", "cat4"}, "both ends of a domain's difficulties stay"
    assert rows["twin"] == {
        "prompt": LONG,
        "extra": "twin",
        "id": "twin",
        "domain": "other",
        "difficulty": 0.5,
        "pass_rate": 0.5,
        "pass_samples": 2,
        "mean_tokens": 2.0,
    }
    whys = {row["id"]: row["why"] for row in curation.fates()}
    assert whys["twin2"] == "similarity 0.95 to twin" or whys["twin2"].startswith("similarity")
    assert whys["failed"] == "reward `right` timed out"
    assert whys["hacked"] == "8 of 8 tries right without thinking"
    assert sum(report["difficulty"].values()) == 3


@pytest.mark.parametrize(
    ("counts", "settings", "sizes"),
    [
        ({"a": 10, "b": 4}, {}, {"a": 10, "b": 4}),
        ({"a": 10, "b": 4}, {"max_per_domain": 5}, {"a": 5, "b": 4}),
        ({"a": 10, "b": 4}, {"shares": {"a": 1, "b": 1}}, {"a": 4, "b": 4}),
        ({"a": 10, "b": 4, "c": 9}, {"shares": {"a": 3, "b": 1}}, {"a": 10, "b": 3, "c": 0}),
        ({"a": 10}, {"shares": {"a": 1, "b": 1}}, {"a": 0}),
    ],
)
def test_domain_sizes(counts, settings, sizes):
    assert domain_sizes(counts, DomainsConfig(**settings)) == sizes


@pytest.mark.parametrize(
    ("count", "wanted", "places"), [(5, 3, [0, 2, 4]), (5, 9, [0, 1, 2, 3, 4]), (5, 1, [2]), (5, 0, []), (4, 2, [0, 3])]
)
def test_evenly(count, wanted, places):
    assert evenly(count, wanted) == places


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_pass_rate": 0.9, "max_pass_rate": 0.1}, "min_pass_rate 0.9 is above max_pass_rate 0.1"),
        ({"rules": {"own": {"x": "("}}}, "is not a regular expression"),
        ({"rules": {"own": {"kept": "x"}}}, "name the rule otherwise"),
        ({"rules": {"drop": ["multiple_choise"]}}, "multiple_choise"),
        ({"hack": {"template": {"user": "no place"}}}, "needs `{question}` once"),
    ],
)
def test_mistakes_in_the_recipe(change, message):
    with pytest.raises(RecipeError) as error:
        config(**change)
    assert message in str(error.value)
