"""The warm-up set's filters: each drops what it should, every sample has one fate, kept answers are few and unlike each other."""

import pytest

from bregman.config import parse
from bregman.errors import RecipeError
from bregman.types import Group, Problem, Segment, Trajectory
from sft.long_cot import Fate, count_fates, judge_group, sft_row, shingles, thinking_of, traits_of
from sft.long_cot_config import TEMPLATES, TRAITS, LongCoTConfig, QualityConfig

GOOD = "<think>First, a plan: add the two numbers. Check: 2+2=4 makes sense.</think>The answer is 4."
LOOSE = QualityConfig(traits={}, min_traits=0, keep=100, near_duplicate=1.0)


def sample(index, text, *, reward=1.0, finish="stop", tokens=None):
    ids = tuple(tokens if tokens is not None else range(len(text.split())))
    return Trajectory(
        problem_id="p",
        sample_index=index,
        token_ids=ids,
        logprobs=(),
        segments=(Segment(policy_version=3, length=len(ids)),),
        finish_reason=finish,
        text=text,
        reward=reward,
        reward_parts={"right": reward},
    )


def group(*samples):
    question = {"role": "user", "content": "2+2?"}
    return Group(problem=Problem(id="p", messages=(question,), prompt_ids=(1,), source="sums"), trajectories=samples)


def fate(text, quality, **options):
    return judge_group(group(sample(0, text, **options)), quality)[0].fate


@pytest.mark.parametrize(
    ("expected", "text", "quality", "options"),
    [
        (Fate.KEPT, GOOD, QualityConfig(), {}),
        (Fate.UNANSWERED, "", QualityConfig(), {"finish": "error", "reward": None}),
        (Fate.REWARD_FAILED, GOOD, QualityConfig(), {"reward": None}),
        (Fate.WRONG, GOOD, QualityConfig(), {"reward": 0.0}),
        (Fate.TRUNCATED, GOOD, QualityConfig(), {"finish": "length"}),
        (Fate.MALFORMED, "The answer is 4.", LOOSE, {}),
        (Fate.KEPT, "The answer is 4.", LOOSE.model_copy(update={"think": False}), {}),
        (Fate.MALFORMED, "<think>never closed", LOOSE, {}),
        (Fate.MALFORMED, "<think>a</think>b</think>c", LOOSE, {}),
        (Fate.MALFORMED, "before<think>a</think>b", LOOSE, {}),
        (Fate.MALFORMED, "<think>a</think>", LOOSE, {}),
        (Fate.MALFORMED, "<think> </think>b", LOOSE, {}),
        (Fate.LENGTH, GOOD, LOOSE.model_copy(update={"max_tokens": 3}), {}),
        (Fate.LENGTH, GOOD, LOOSE.model_copy(update={"min_tokens": 100}), {}),
        (Fate.REPETITION, GOOD, LOOSE, {"tokens": [1, 2] * 30}),
        (Fate.REPETITION, GOOD, LOOSE, {"finish": "repetition"}),
        (Fate.FORBIDDEN, GOOD, LOOSE.model_copy(update={"forbidden": ["the ANSWER is"]}), {}),
        (Fate.TRAITS, "<think>2+2=4</think>4", QualityConfig(), {}),
    ],
)
def test_each_filter(expected, text, quality, options):
    assert fate(text, quality, **options) is expected


def test_every_sample_has_one_fate_and_the_counts_add_up():
    texts = [GOOD, GOOD, GOOD.replace("two", "both"), "<think>wrong</think>5", "<think>4</think>4", "open"]
    samples = [sample(index, text, reward=float("5" not in text)) for index, text in enumerate(texts)]
    judged = judge_group(group(*samples), QualityConfig(near_duplicate=0.7))
    assert [one.fate for one in judged] == ["kept", "duplicate", "near_duplicate", "wrong", "too_few_traits", "malformed_thinking"]
    counts = count_fates(judged)
    assert sum(counts.values()) == 6
    assert set(counts) == {str(fate) for fate in Fate}


def test_at_most_so_many_are_kept_shortest_or_most_unlike():
    texts = ["<think>a b c d e f g</think>x", "<think>a b c d e f h</think>x", "<think>q r</think>x", "<think>s t u v w z</think>x"]
    samples = [sample(index, text, tokens=range(len(text))) for index, text in enumerate(texts)]

    def kept(pick):
        quality = LOOSE.model_copy(update={"keep": 2, "pick": pick})
        return [one.trajectory.sample_index for one in judge_group(group(*samples), quality) if one.fate is Fate.KEPT]

    assert kept("shortest") == [2, 3]
    assert kept("diverse") == [0, 3]
    assert 1 not in kept("diverse"), "the one most like the first"


def test_of_two_alike_the_shorter_stays_when_the_shortest_are_picked():
    samples = [sample(0, GOOD, tokens=range(40)), sample(1, GOOD, tokens=range(30))]
    fates = [one.fate for one in judge_group(group(*samples), LOOSE.model_copy(update={"pick": "shortest"}))]
    assert fates == [Fate.DUPLICATE, Fate.KEPT]


@pytest.mark.parametrize(
    ("text", "prompt_end", "answer"),
    [
        (GOOD, "<|im_assistant|>", GOOD),
        (GOOD.removeprefix("<think>"), "<|im_assistant|>", GOOD),
        (GOOD, "assistant\n<think>\n", GOOD.removeprefix("<think>")),
        (GOOD.replace("<think>", "◁think▷").replace("</think>", "◁/think▷"), "", GOOD),
    ],
    ids=["as it is", "mark missing", "mark in the prompt", "marks of another model"],
)
def test_rows_hold_the_plain_question_one_pair_of_marks_and_where_they_came_from(text, prompt_end, answer):
    asked = group(sample(5, text))
    (judged,) = judge_group(asked, QualityConfig())
    row = sft_row(asked, judged, prompt_opens=prompt_end, templates=["plan", "explore"], per_template=4)
    assert row["messages"] == [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": answer}]
    provenance = {key: row[key] for key in ("id", "problem_id", "source", "template", "sample_index", "policy_version", "reward")}
    assert provenance == {
        "id": "p#5",
        "problem_id": "p",
        "source": "sums",
        "template": "explore",
        "sample_index": 5,
        "policy_version": 3,
        "reward": 1.0,
    }


def test_lexical_marks_tell_the_traits():
    texts = {
        "planning": "First, we need to find x.",
        "evaluation": "Let us verify that.",
        "reflection": "Wait, that is off.",
        "exploration": "Alternatively, substitute.",
    }
    for trait, text in texts.items():
        assert trait in traits_of(text, TRAITS)
    assert traits_of("2+2=4", TRAITS) == ()


def test_thinking_and_shingles():
    assert thinking_of("<think>a</think>b") == ("a", "b")
    assert thinking_of("a</think>b") == ("a", "b")
    assert shingles("a+b") != shingles("a-b")
    assert len(shingles("one")) == 1


def test_built_in_templates_speak_of_the_recipes_marks():
    base = {"problems": {"kind": "jsonl", "path": "p"}, "sampling": {"max_tokens": 8}}
    config = parse(LongCoTConfig, {**base, "think_mark": "◁think▷"}, "recipe")
    assert "◁/think▷" in config.template("plan").user
    assert "<think>" not in config.template("plan").user
    assert TEMPLATES["plain"].is_plain


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"templates": ["plam"]}, "no template `plam`; there is: plain, plan"),
        ({"templates": ["plan", "plan"]}, "named twice"),
        ({"own_templates": {"x": {"user": "no place"}}}, "needs `{question}` once"),
        ({"quality": {"traits": {}, "min_traits": 1}}, "min_traits is 1, and there are 0 traits"),
        ({"quality": {"forbidden": ["("]}}, "is not a regular expression"),
        ({"quality": {"min_tokens": 9, "max_tokens": 8}}, "min_tokens 9 is above max_tokens 8"),
        ({"generator": {"kind": "endpoint", "base_url": "localhost:1", "model": "m"}}, "is not an http:// or https:// address"),
        (
            {
                "generator": {"kind": "endpoint", "base_url": "http://x/v1", "model": "m"},
                "own_templates": {"x": {"prefill": "a"}},
                "templates": ["x"],
            },
            "has a prefill, which an endpoint cannot be given",
        ),
    ],
)
def test_mistakes_in_the_recipe(change, message):
    base = {"problems": {"kind": "jsonl", "path": "p"}, "sampling": {"max_tokens": 8}}
    with pytest.raises(RecipeError) as error:
        parse(LongCoTConfig, base | change, "recipe")
    assert message in str(error.value)
