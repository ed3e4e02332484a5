"""What an evaluation counts: samples, problems, failures and lengths."""

import pytest
from fakes import BigramEngine, BigramLearner, FunctionScorer, problem

from bregman.errors import DataError
from evals.config import EvalConfig
from evals.evaluate import evaluate, summarise

CONFIG = EvalConfig.model_validate(
    {
        "problems": {"kind": "python", "path": "unused.py:unused"},
        "sampling": {"num_samples": 4, "max_tokens": 5},
        "rewards": {"functions": [{"function": "unused"}]},
    }
)


def _engine():
    engine = BigramEngine()
    engine.load_weights(BigramLearner(), 0)
    return engine


def test_avg_and_pass_at_k():
    scorer = FunctionScorer(lambda t: {"a": [1, 0, 0, 1], "b": [0, 0, 0, 0]}[t.problem_id][t.sample_index])
    result, groups = evaluate(_engine(), scorer, [problem("a"), problem("b")], CONFIG)
    assert result.accuracy == pytest.approx(2 / 8)
    assert result.pass_at_k == pytest.approx(1 / 2)
    assert (result.num_problems, result.samples_per_problem) == (2, 4)
    lengths = [len(t.token_ids) for g in groups for t in g.trajectories]
    assert result.mean_tokens == pytest.approx(sum(lengths) / 8)
    assert result.truncated == pytest.approx(sum(t.finish_reason == "length" for g in groups for t in g.trajectories) / 8)


def test_a_failed_reward_counts_as_wrong_but_not_in_the_mean_of_its_part():
    scorer = FunctionScorer(lambda t: [1.0, None, 1.0, None][t.sample_index])
    result, _ = evaluate(_engine(), scorer, [problem("a")], CONFIG)
    assert result.accuracy == 0.5
    assert result.metrics == {"right": 1.0}


def test_the_same_seed_gives_the_same_answers():
    first, second = (evaluate(_engine(), FunctionScorer(lambda t: 1.0), [problem("a")], CONFIG)[1] for _ in range(2))
    assert first == second
    assert summarise(first) == summarise(second)


def test_no_problems_is_an_error():
    with pytest.raises(DataError, match="no problems"):
        evaluate(_engine(), FunctionScorer(lambda t: 1.0), [], CONFIG)
