"""Which problems come next: passes, phases, priorities, and the state that a resumed run continues from."""

import json
from collections import Counter

import pytest

from bregman.errors import DataError
from bregman.types import Group, Problem, Segment, Trajectory
from samplers.build import build_sampler
from samplers.config import CurriculumConfig, CurriculumPhase, PrioritizedConfig, UniformConfig

PROBLEMS = [Problem(id=str(i), messages=(), prompt_ids=(1,), difficulty=i / 20) for i in range(20)]
PHASES = [CurriculumPhase(start=0, max_difficulty=0.4), CurriculumPhase(start=3, min_difficulty=0.5)]
CONFIGS = [UniformConfig(), CurriculumConfig(phases=PHASES), PrioritizedConfig(), PrioritizedConfig(phases=PHASES)]


def _group(problem, scores):
    trajectories = tuple(
        Trajectory(
            problem_id=problem.id,
            sample_index=i,
            token_ids=(1,),
            logprobs=(0.0,),
            segments=(Segment(policy_version=0, length=1),),
            finish_reason="stop",
            text="",
            reward=score,
            reward_parts={"right": score, "style": 1.0},
        )
        for i, score in enumerate(scores)
    )
    return Group(problem=problem, trajectories=trajectories)


def _ids(problems):
    return [problem.id for problem in problems]


def test_uniform_shows_every_problem_once_per_pass():
    sampler = build_sampler(UniformConfig(), PROBLEMS, seed=0)
    seen = [_ids(sampler.next_problems(5, i)) for i in range(4)]
    assert sorted(sum(seen, [])) == sorted(_ids(PROBLEMS))
    assert _ids(build_sampler(UniformConfig(), PROBLEMS, seed=1).next_problems(5, 0)) != seen[0]


def test_curriculum_moves_from_easy_to_hard():
    sampler = build_sampler(CONFIGS[1], PROBLEMS, seed=0)
    easy = [p.difficulty for i in range(3) for p in sampler.next_problems(6, i)]
    hard = [p.difficulty for i in range(3, 6) for p in sampler.next_problems(6, i)]
    assert max(easy) <= 0.4
    assert min(hard) >= 0.5


def test_prioritized_draws_in_proportion_to_one_minus_success():
    """Success rates 0, 1/2, 3/4 and 1 with floor 0.05: first draws in proportion 1 : 0.5 : 0.25 : 0.05."""
    problems = PROBLEMS[:4]
    sampler = build_sampler(PrioritizedConfig(floor=0.05), problems, seed=0)
    sampler.observe([_group(p, s) for p, s in zip(problems, [[0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], strict=True)])
    draws = Counter(sampler.next_problems(1, 0)[0].id for _ in range(6000))
    for problem, weight in zip(problems, [1.0, 0.5, 0.25, 0.05], strict=True):
        assert draws[problem.id] / 6000 == pytest.approx(weight / 1.8, abs=0.02)


def test_success_is_the_primary_reward_and_failed_rewards_do_not_count():
    sampler = build_sampler(PrioritizedConfig(), PROBLEMS, seed=0)
    sampler.observe([_group(PROBLEMS[0], [1.0, 0.0, None, 0.5])])
    assert sampler.success_rate("0") == pytest.approx(1 / 3)
    assert sampler.success_rate("1") == 0.0


@pytest.mark.parametrize("config", CONFIGS)
def test_no_problem_twice_in_an_iteration_unless_there_are_too_few(config):
    sampler = build_sampler(config, PROBLEMS, seed=0)
    for _ in range(30):  # 6 does not divide the number of problems: passes end in the middle of a call
        assert len(set(_ids(sampler.next_problems(6, 0)))) == 6
    assert len(sampler.next_problems(50, 0)) == 50


@pytest.mark.parametrize("config", CONFIGS)
def test_state_survives_a_resume(config):
    sampler = build_sampler(config, PROBLEMS, seed=0)
    sampler.next_problems(7, 0)
    sampler.observe([_group(PROBLEMS[2], [1.0, 1.0])])
    state = json.loads(json.dumps(sampler.state_dict()))
    resumed = build_sampler(config, PROBLEMS, seed=0)
    resumed.load_state_dict(state)
    for iteration in range(1, 5):
        assert _ids(sampler.next_problems(7, iteration)) == _ids(resumed.next_problems(7, iteration))


def test_curriculum_needs_labels():
    unlabelled = [*PROBLEMS, Problem(id="x", messages=(), prompt_ids=(1,))]
    with pytest.raises(DataError, match="problem x has no difficulty label"):
        build_sampler(CONFIGS[1], unlabelled, seed=0)


def test_empty_phase_is_an_error_at_the_start():
    config = CurriculumConfig(phases=[CurriculumPhase(start=0), CurriculumPhase(start=9, min_difficulty=0.99)])
    with pytest.raises(DataError, match=r"phases\[1\].*no problem has a difficulty in \[0.99, 1.0\]"):
        build_sampler(config, PROBLEMS, seed=0)
