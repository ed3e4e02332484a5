"""Weight sync: the shared segment on its own, and real vLLM engines taking weights a -> b -> a."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from bregman.engines import cluster
from bregman.engines.config import ClusterConfig, EngineConfig
from bregman.engines.vllm_engine import GenerationRequest, VLLMEngine
from bregman.engines.weight_sync import SharedMemoryWriter, folder_handle, read_tensors, wire_dtype
from bregman.errors import ClusterError, DataError


@pytest.fixture
def writer(tmp_path):
    writer = SharedMemoryWriter(tmp_path)
    yield writer
    writer.close()


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a": torch.randn(7, 5),
        "transposed": torch.randn(6, 4).T,
        "half": torch.randn(129).to(torch.bfloat16),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "integers": torch.arange(5),
    }


def test_every_tensor_arrives_as_it_was(writer):
    handle = pickle.loads(pickle.dumps(writer.write(iter(tensors().items()))))
    read = dict(read_tensors(handle))
    assert list(read) == list(tensors())
    for name, tensor in tensors().items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_segment_is_reused_and_grows(writer):
    small = writer.write([("w", torch.zeros(4))])
    large = writer.write([("w", torch.ones(50_000))])
    again = writer.write([("w", torch.full((4,), 2.0))])
    assert small.path == large.path == again.path
    assert dict(read_tensors(again))["w"].tolist() == [2.0] * 4


def test_a_handle_is_stale_after_the_next_write(writer):
    first = writer.write([("w", torch.zeros(4))])
    second = writer.write([("w", torch.ones(4))])
    with pytest.raises(ClusterError, match="holds write 2, not write 1"):
        list(read_tensors(first))
    list(read_tensors(second))


def test_a_write_that_broke_off_is_never_read(writer):
    handle = writer.write([("w", torch.zeros(4))])

    def breaks_off():
        yield "w", torch.ones(4)
        raise RuntimeError("learner lost")

    with pytest.raises(RuntimeError, match="learner lost"):
        writer.write(breaks_off())
    with pytest.raises(ClusterError, match="holds write 0"):
        list(read_tensors(handle))


def test_damage_is_noticed(writer):
    handle = writer.write([("w", torch.zeros(40))])
    with open(handle.path, "r+b") as segment:
        segment.seek(handle.tensors[0].offset)
        segment.write(b"\x01")
    with pytest.raises(ClusterError, match="checksum"):
        list(read_tensors(handle))


def test_no_space_left_names_the_place(writer, monkeypatch):
    pwrite = os.pwrite

    def full(fd, data, offset):
        if offset > 100:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ClusterError, match="no space left") as caught:
        writer.write(tensors().items())
    assert caught.value.where.endswith(f": {writer.folder}")


def test_too_little_room_is_an_error_before_anything_is_written(writer):
    handle = writer.write([("w", torch.zeros(4))])
    with pytest.raises(ClusterError, match="9,000,000,000,000,000 bytes of weights do not fit"):
        writer.write([("w", torch.ones(4))], expected_bytes=9 * 10**15)
    assert dict(read_tensors(handle))["w"].tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("name", "tensor", "travels"),
    [
        ("up_proj.weight", torch.zeros(2, 2), torch.bfloat16),
        ("norm.weight", torch.zeros(2), torch.float32),
        ("mlp.gate.e_score_correction_bias", torch.zeros(2), torch.float32),
        ("mlp.gate.weight", torch.zeros(2, 2), torch.float32),
        ("positions", torch.zeros(2, 2, dtype=torch.int64), torch.int64),
    ],
)
def test_matrices_travel_in_the_dtype_of_the_engine(name, tensor, travels):
    assert wire_dtype(name, tensor, torch.bfloat16) == travels
    assert wire_dtype(name, tensor, None) == tensor.dtype


def test_segments_of_killed_writers_are_removed_and_no_others(tmp_path):
    code = "import sys, time; from pathlib import Path; from bregman.engines.weight_sync import SharedMemoryWriter\n"
    code += "w = SharedMemoryWriter(Path(sys.argv[1])); print(w.path, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        orphan = Path(process.stdout.readline().strip())
        process.kill()
    assert orphan.exists()
    alive = SharedMemoryWriter(tmp_path)
    assert not orphan.exists()
    other = SharedMemoryWriter(tmp_path)
    assert Path(alive.path).exists()
    for writer in (alive, other):
        writer.close()
        writer.close()
    assert not list(tmp_path.iterdir())


def test_a_handle_of_a_writer_that_is_gone(tmp_path):
    writer = SharedMemoryWriter(tmp_path)
    handle = writer.write([("w", torch.zeros(4))])
    writer.close()
    with pytest.raises(ClusterError, match="the learner that wrote it is gone"):
        list(read_tensors(handle))


def test_folders(tmp_path):
    with pytest.raises(DataError, match="no \\*.safetensors file"):
        folder_handle(tmp_path)
    save_file({"w": torch.arange(6.0).reshape(2, 3)}, tmp_path / "model.safetensors")
    handle = folder_handle(tmp_path)
    assert [(spec.name, spec.dtype, spec.shape) for spec in handle.tensors] == [("w", "float32", (2, 3))] and handle.num_bytes == 24
    assert torch.equal(dict(read_tensors(handle))["w"], torch.arange(6.0).reshape(2, 3))
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(DataError, match="not a readable safetensors file"):
        folder_handle(tmp_path)


# --- real engines ---

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512, "initializer_range": 0.1, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
ENGINE = EngineConfig(max_model_len=256, max_num_seqs=32, kv_cache_mib=16)
KINDS = ("experts", "tied", "untied")  # experts first: vLLM makes the groups of its process for the first model
PROMPT = tuple(5 + (7 * i) % 50 for i in range(150))  # longer than a block of the prefix cache


def make_model(kind: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    if kind == "experts":
        sizes = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, tie_word_embeddings=False)).float().eval()
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=kind == "tied")).float().eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of each kind, in memory and saved."""
    made = {}
    for kind in KINDS:
        for seed, name in enumerate("ab"):
            folder = tmp_path_factory.mktemp(f"{kind}-{name}")
            model = make_model(kind, seed)
            model.save_pretrained(folder)
            made[kind, name] = (model, folder)
    return made


@pytest.fixture(scope="module")
def engines(models):
    """`call(method, name, ...)` on a process that holds an engine of each kind, all started from model a."""

    class Engines:  # local, so that Ray sends it by value: workers cannot import test modules
        def __init__(self) -> None:
            self.engines: dict[str, VLLMEngine] = {}

        def start(self, name: str, folder: str) -> None:
            self.engines[name] = VLLMEngine(folder, ENGINE.model_copy(update={"dtype": "bfloat16"} if "bfloat16" in name else {}))

        def generate(self, name: str, requests: list[GenerationRequest]):
            return self.engines[name].generate(requests)

        def load_weights(self, name: str, handle, version: int):
            return self.engines[name].load_weights(handle, version)

    cluster.start(ClusterConfig())
    actor = ray.remote(Engines).options(num_cpus=1, runtime_env={"env_vars": dict(cluster.WORKER_ENV)}).remote()

    def call(method: str, *arguments):
        return cluster.wait([getattr(actor, method).remote(*arguments)], what=method, timeout=120)[0]

    for kind in KINDS:
        call("start", kind, str(models[kind, "a"][1]))
    yield call
    ray.kill(actor)
    cluster.stop()


def requests() -> list[GenerationRequest]:
    return [GenerationRequest(prompt_ids=PROMPT[: 10 + 20 * i], max_tokens=24, seed=i) for i in range(8)]


def published(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def worst_difference(model: torch.nn.Module, generations) -> float:
    worst = 0.0
    for request, generation in zip(requests(), generations, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *generation.token_ids]])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        start = len(request.prompt_ids)
        expected = logprobs[torch.arange(start - 1, ids.shape[1] - 1), ids[0, start:]]
        worst = max(worst, (expected - torch.tensor(generation.logprobs)).abs().max().item())
    return worst


@pytest.mark.parametrize("kind", KINDS)
def test_engine_follows_the_weights(kind, engines, models, writer):
    """a -> b -> a: log-probs are those of the model sent, and going back gives the first tokens bit for bit."""
    (model_a, folder_a), (model_b, folder_b) = models[kind, "a"], models[kind, "b"]
    first = engines("generate", kind, requests())
    assert worst_difference(model_a, first) < 1e-5
    for version, (model, folder) in enumerate([(model_b, folder_b), (model_a, folder_a)]):
        handle = writer.write(published(folder).items())
        for _ in range(2):  # a handle that is sent again changes nothing
            engines("load_weights", kind, handle, version)
        generations = engines("generate", kind, requests())
        assert worst_difference(model, generations) < 1e-5
        assert worst_difference(model_b if model is model_a else model_a, generations) > 0.1
    assert generations == first
    engines("load_weights", kind, folder_handle(folder_b), 3)
    assert worst_difference(model_b, engines("generate", kind, requests())) < 1e-5


def test_synced_engine_equals_one_started_from_the_weights(engines, models, writer):
    _, folder = models["tied", "b"]
    engines("start", "fresh", str(folder))
    engines("load_weights", "tied", writer.write(published(folder).items()), 1)
    assert engines("generate", "tied", requests()) == engines("generate", "fresh", requests())


def test_rounding_before_the_way_is_rounding_on_arrival(engines, models, writer):
    engines("start", "bfloat16", str(models["experts", "a"][1]))
    sent = published(models["experts", "b"][1])
    engines("load_weights", "bfloat16", writer.write(sent.items()), 1)
    whole = engines("generate", "bfloat16", requests())
    rounded = {name: tensor.to(wire_dtype(name, tensor, torch.bfloat16)) for name, tensor in sent.items()}
    handle = writer.write(rounded.items())
    assert handle.num_bytes < 0.6 * sum(4 * tensor.numel() for tensor in sent.values())
    engines("load_weights", "bfloat16", handle, 2)
    assert engines("generate", "bfloat16", requests()) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_a_move_of_one_millionth_arrives(kind, engines, models, writer, tmp_path):
    """An update far below the rounding of a probe, in every weight: packed copies follow it too."""
    model, folder = models[kind, "a"]
    model.save_pretrained(tmp_path)
    torch.manual_seed(7)
    moved = {name: tensor + 1e-6 * torch.randn_like(tensor).sign() for name, tensor in published(folder).items()}
    save_file(moved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    engines("load_weights", kind, writer.write(published(folder).items()), 1)
    before = engines("generate", kind, requests())
    engines("load_weights", kind, writer.write(moved.items()), 2)
    engines("start", f"moved {kind}", str(tmp_path))  # under a name of its own: an engine that goes takes its process's groups with it
    after = engines("generate", kind, requests())
    assert after == engines("generate", f"moved {kind}", requests())
    assert after != before


def test_incomplete_weights_are_refused_and_the_old_ones_stay(engines, models, writer):
    weights = published(models["untied", "a"][1])
    engines("load_weights", "untied", writer.write(weights.items()), 1)
    before = engines("generate", "untied", requests())
    norm = weights.pop("model.norm.weight")
    with pytest.raises(ClusterError, match=r"`model\.norm\.weight` was not sent"):
        engines("load_weights", "untied", writer.write(weights.items()), 2)
    with pytest.raises(ClusterError, match=r"shape \(63,\) where the engine's model has \(64,\)"):
        engines("load_weights", "untied", writer.write({**weights, "model.norm.weight": norm[1:]}.items()), 2)
    with pytest.raises(ClusterError, match=r"has no `base_model\.w`"):
        engines("load_weights", "untied", writer.write({**weights, "model.norm.weight": norm, "base_model.w": norm}.items()), 2)
    assert engines("generate", "untied", requests()) == before


def test_sync_is_fast(engines, models, writer):
    """A sync of a small model takes milliseconds, not a restart."""
    weights = published(models["tied", "a"][1])
    started = time.perf_counter()
    engines("load_weights", "tied", writer.write(weights.items()), 1)
    assert time.perf_counter() - started < 2
