"""Chunked sampling: chunks, resuming after a kill, several ways of asking, and data that changed underneath."""

from dataclasses import replace

import pytest
import torch
from fakes import BigramEngine, FunctionScorer, ListTracker, problem

from bregman.engines.config import SamplingConfig
from bregman.errors import DataError
from recipes.sampling import ChunkedSampling, as_it_is, chunk_seed, finished_chunks

SAMPLING = SamplingConfig(num_samples=3, max_tokens=6)
PROBLEMS = [problem(f"p{number}") for number in range(5)]
SCORER = FunctionScorer(lambda trajectory: float(len(trajectory.token_ids) > 2))


class Killed(Exception):
    pass


class Engine(BigramEngine):
    """Dies at the call `dies_at`; notes the prompts it was asked."""

    def __init__(self, dies_at: int | None = None) -> None:
        super().__init__()
        self.table = torch.eye(6)
        self.version = 0
        self.dies_at, self.asked = dies_at, []

    def rollout(self, problems, sampling, *, seed):
        if self.dies_at == len(self.asked):
            raise Killed
        self.asked.append([p.prompt_ids for p in problems])
        return super().rollout(problems, sampling, seed=seed)


def draw(folder, engine, tracker=None, problems=PROBLEMS, **options):
    sampling = ChunkedSampling(lambda: engine, tracker or ListTracker(), folder, seed=1)
    groups = [group for chunk in sampling.draw("samples", problems, SAMPLING, SCORER, chunk=2, **options) for group in chunk]
    return groups, sampling.step


def content(groups):
    return [(g.problem.id, t.sample_index, t.token_ids, t.text, t.reward, t.reward_parts) for g in groups for t in g.trajectories]


def test_a_killed_stage_goes_on_at_the_next_chunk_and_makes_the_same_data(tmp_path):
    whole, steps = draw(tmp_path / "whole", Engine())
    assert steps == 3
    with pytest.raises(Killed):
        draw(tmp_path / "killed", Engine(dies_at=2))
    assert finished_chunks(tmp_path / "killed") == 2
    second, tracker = Engine(), ListTracker()
    resumed, _ = draw(tmp_path / "killed", second, tracker)
    assert content(resumed) == content(whole)
    assert len(second.asked) == 1, "chunks on disk are not sampled again"
    assert [step for step, _ in tracker.rows] == [2]
    assert tracker.planned == 4


def test_a_finished_draw_needs_no_engine(tmp_path):
    draw(tmp_path, Engine())
    again, _ = draw(tmp_path, None)
    assert len(again) == 5


def test_chunks_have_seeds_of_their_own(tmp_path):
    assert len({chunk_seed(0, name, number) for name in ("hack", "difficulty") for number in range(50)}) == 100
    same = [replace(PROBLEMS[0], id=f"q{number}") for number in range(4)]
    groups, _ = draw(tmp_path, Engine(), problems=same)
    texts = [[t.text for t in group.trajectories] for group in groups]
    assert texts[0] != texts[2], "the same problem in another chunk gets other samples"


def test_ways_of_asking_share_a_group_and_its_plain_problem(tmp_path):
    def in_other_words(p):
        return replace(p, prompt_ids=(1, 2, 3))

    engine = Engine()
    groups, _ = draw(tmp_path, engine, ask=[as_it_is, in_other_words], prefills=["", "so: "])
    assert engine.asked[0] == [(1, 2), (1, 2, 3)] * 2
    assert [t.sample_index for t in groups[0].trajectories] == list(range(6))
    assert [t.text.startswith("so: ") for t in groups[0].trajectories] == [False] * 3 + [True] * 3
    assert groups[0].problem is PROBLEMS[0]


@pytest.mark.parametrize(
    "changed",
    [
        [*PROBLEMS[:4], problem("other")],
        PROBLEMS[::-1],
        PROBLEMS[:3],
        [replace(PROBLEMS[0], answer="8"), *PROBLEMS[1:]],
        [replace(PROBLEMS[0], messages=({"role": "user", "content": "reworded"},)), *PROBLEMS[1:]],
    ],
    ids=["another", "reordered", "fewer", "answer", "question"],
)
def test_parts_of_other_problems_are_refused(tmp_path, changed):
    draw(tmp_path, Engine())
    with pytest.raises(DataError, match="other problems.*--fresh"):
        draw(tmp_path, Engine(), problems=changed)


def test_metrics_say_what_a_chunk_gave(tmp_path):
    tracker = ListTracker()
    groups, _ = draw(tmp_path, Engine(), tracker)
    first = tracker.rows[0][1]
    own = [t for g in groups[:2] for t in g.trajectories]
    assert first["samples"] == 6
    assert first["accuracy"] == sum(t.reward for t in own) / 6
    assert first["response_tokens/mean"] == sum(len(t.token_ids) for t in own) / 6
    assert first["samples_per_second"] > 0
