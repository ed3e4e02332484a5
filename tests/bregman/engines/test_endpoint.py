"""The endpoint engine against a server on this machine: requests, bounded concurrency, retries, failures, images and thinking."""

import base64
import io

import pytest
from chat_server import Server

from bregman.chat_client import Endpoint
from bregman.engines.config import SamplingConfig
from bregman.engines.endpoint import EndpointEngine, chat_messages
from bregman.errors import ClusterError
from bregman.types import Problem

SAMPLING = SamplingConfig(num_samples=4, max_tokens=32, temperature=0.7)


@pytest.fixture
def serve():
    servers = []

    def start(**options):
        servers.append(Server(**options))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def engine(server, **options):
    settings = {"timeout": 5.0, "retries": 2, "backoff": 0.01, "max_requests": None, "max_tokens_total": None, "api_key": "secret"}
    mine = {key: options.pop(key) for key in list(options) if key in settings}
    endpoint = Endpoint(base_url=server.address, **settings | mine)
    return EndpointEngine(endpoint, "teacher", tokenize=lambda text: list(text.encode()), **options)


def problem(text="2+2?"):
    return Problem(id=text, messages=({"role": "user", "content": text},), prompt_ids=(1,))


def test_samples_come_in_order_with_seeds_of_their_own(serve):
    server = serve()
    groups = engine(server, extra={"min_p": 0.1}).rollout([problem("a"), problem("b")], SAMPLING, seed=3)
    texts = [[t.text for t in group.trajectories] for group in groups]
    assert [text.split()[0] for own in texts for text in own] == ["a"] * 4 + ["b"] * 4
    assert len({text for own in texts for text in own}) == 8
    again = engine(server).rollout([problem("a"), problem("b")], SAMPLING, seed=3)
    assert [[t.text for t in group.trajectories] for group in again] == texts
    sent = server.bodies[0]
    assert (sent["model"], sent["max_tokens"], sent["temperature"], sent["min_p"]) == ("teacher", 32, 0.7, 0.1)
    assert server.headers[0]["Authorization"] == "Bearer secret"
    first = groups[0].trajectories[0]
    assert (first.finish_reason, len(first.token_ids), first.logprobs) == ("stop", len(first.text), ())


def test_no_more_requests_at_once_than_asked(serve):
    server = serve(delay=0.05)
    engine(server, concurrency=3).rollout([problem(str(n)) for n in range(4)], SAMPLING, seed=0)
    assert len(server.bodies) == 16
    assert 2 <= server.most <= 3


def test_busy_servers_are_asked_again(serve):
    server = serve(script={0: 503, 1: 429})
    groups = engine(server, concurrency=1).rollout([problem()], SAMPLING, seed=0)
    assert len(server.bodies) == 6
    assert all(t.finish_reason == "stop" for t in groups[0].trajectories)


def test_a_lost_sample_is_said_and_a_broken_endpoint_ends_the_stage(serve):
    said = []
    server = serve(script={0: 400})
    groups = engine(server, concurrency=1, warn=said.append).rollout([problem()], SAMPLING, seed=0)
    assert [t.finish_reason for t in groups[0].trajectories] == ["error", "stop", "stop", "stop"]
    assert "1 of 4 requests failed, the first: HTTP 400" in said[0]
    with pytest.raises(ClusterError, match="4 of 4 requests failed, the first: HTTP 401"):
        engine(serve(script={"all": 401})).rollout([problem()], SAMPLING, seed=0)


@pytest.mark.parametrize(
    ("options", "server_options", "message"),
    [
        ({"timeout": 0.1, "retries": 0}, {"delay": 0.6}, "no answer within 0.1 s"),
        ({"max_requests": 1, "concurrency": 1}, {}, "cost bound reached: 1 requests"),
        ({"max_tokens_total": 10, "concurrency": 1}, {}, "cost bound reached: 10 tokens"),
        ({}, {"script": {"all": {"choices": []}}}, "no chat completion"),
    ],
    ids=["deadline", "requests", "tokens", "not a completion"],
)
def test_deadlines_and_bounds(serve, options, server_options, message):
    with pytest.raises(ClusterError, match=message):
        engine(serve(**server_options), **options).rollout([problem()], SAMPLING, seed=0)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_thinking_that_comes_apart_is_put_back(serve, key):
    answer = {"choices": [{"message": {"content": "4", key: "two and two"}, "finish_reason": "length"}]}
    groups = engine(serve(script={"all": answer}), think_marks=("◁think▷", "◁/think▷")).rollout([problem()], SAMPLING, seed=0)
    first = groups[0].trajectories[0]
    assert (first.text, first.finish_reason) == ("◁think▷two and two◁/think▷4", "length")


def test_images_are_sent_as_png():
    from PIL import Image

    picture = Image.new("RGB", (3, 2), "red")
    content = [{"type": "text", "text": "What is "}, {"type": "image"}, {"type": "text", "text": "?"}]
    shown = Problem(id="p", messages=({"role": "user", "content": content},), prompt_ids=(1,), images=(picture,))
    (message,) = chat_messages(shown)
    before, image, after = message["content"]
    head, _, data = image["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0)) == (255, 0, 0)
    assert (before["text"], after["text"]) == ("What is ", "?")
