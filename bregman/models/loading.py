"""From a folder or hub id to a model that runs on packs of sequences.

Owns finding and reading Hugging Face models; never runs code that comes with a model.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError

from bregman.errors import DataError

if TYPE_CHECKING:
    from bregman.models.policy import PolicyModel

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "tiktoken.model",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)


def hide_cuda_builds() -> None:
    """Keep transformers from importing a torchvision or torchaudio built for CUDA beside a CPU torch, which crashes.

    PyPI's builds of both need CUDA libraries ("operator torchvision::nms does not exist"); text models need neither.
    """
    if torch.version.cuda is not None:
        return
    for name in ("torchvision", "torchaudio", "torchcodec"):
        if name not in sys.modules and _version(name) is not None and "+cpu" not in str(_version(name)):
            sys.modules[name] = None  # type: ignore[assignment]


def find_local(path_or_hub_id: str, revision: str | None = None) -> Path | None:
    """The folder of a model that is on this machine: itself, or the snapshot of a hub id in the local cache; None if it is not here."""
    folder = Path(path_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or not HUB_ID.fullmatch(path_or_hub_id):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path_or_hub_id, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError):
        return None


def resolve_model(path_or_hub_id: str, revision: str | None = None) -> Path:
    """The folder of a model: itself, or the snapshot of a hub id from the local cache or else the hub.

    Raises:
        DataError: neither a folder nor a hub id that is cached or can be fetched.
    """
    found = find_local(path_or_hub_id, revision)
    if found is not None:
        return found
    if Path(path_or_hub_id).expanduser().is_absolute() or not HUB_ID.fullmatch(path_or_hub_id):
        raise DataError(f"model.path ({path_or_hub_id})", "no such folder", "give a folder in Hugging Face format or a hub id")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # no weights in pickle, no code
    try:
        return Path(snapshot_download(path_or_hub_id, revision=revision, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = type(error).__name__
    raise DataError(
        f"model.path ({path_or_hub_id})",
        f"no such folder, not in the local cache, and the hub could not be reached or has no such model ({reason})",
        "check the name, go online, or give a folder",
    )


def load_policy(folder: Path, dtype: torch.dtype = torch.float32) -> PolicyModel:
    """The causal LM in `folder`, on the CPU, ready for packs of sequences.

    Raises:
        DataError: the folder is missing or incomplete, needs its own code, or its architecture cannot run on packs.
    """
    model_type = _model_type(folder)
    hide_cuda_builds()
    from bregman.models.attention import NAME
    from bregman.models.policy import PolicyModel, packing_error

    try:
        model, info = _model_class(model_type).from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=NAME,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise DataError(str(folder), f"not a causal language model that can be loaded ({_first_line(error)})", "see model.path") from error
    if missing := sorted(info["missing_keys"]):  # transformers would train on random ones
        raise DataError(str(folder), f"{len(missing)} weights are missing, {missing[0]} among them", "copy the whole folder")
    _without_dropout(model)
    policy = PolicyModel(model)
    try:
        difference = packing_error(policy)
    except ValueError as error:
        raise DataError(str(folder), _first_line(error), "this architecture is not supported") from error
    if not difference < (1e-3 if dtype == torch.float32 else 0.1):
        found = f"{type(model).__name__} gives other log-probabilities packed than alone (difference {difference:.2g} nats)"
        raise DataError(str(folder), found, "this architecture is not supported")
    return policy


def policy_like(model_class: Any, config: Any) -> PolicyModel:
    """A policy of the same shape as a loaded one of class `model_class` with configuration `config`; its weights are undefined, and
    take memory only where they are written."""
    hide_cuda_builds()
    from bregman.models.attention import NAME
    from bregman.models.policy import PolicyModel

    with torch.device("meta"):
        model = model_class._from_config(config, attn_implementation=NAME, dtype=torch.float32)
    made: dict[int, torch.Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    fresh = torch.nn.Parameter(empty, tensor.requires_grad) if tensors is module._parameters else empty
                    tensors[name] = made.setdefault(id(tensor), fresh)
    _without_dropout(model)
    return PolicyModel(model)


def _without_dropout(model: torch.nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # the ratio of a policy to itself must be 1


def _model_class(model_type: str) -> Any:
    """Not through the Auto classes for Kimi-VL: vLLM, where it is loaded too, has registered a configuration of its own."""
    if model_type == "kimi_vl":
        from bregman.models.kimi_vl.modeling import KimiVLForConditionalGeneration

        return KimiVLForConditionalGeneration
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM


def _model_type(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        found = "no config.json in this folder" if folder.is_dir() else "no such folder"
        raise DataError(str(folder), found, "give a model folder in Hugging Face format") from None
    except (ValueError, OSError) as error:
        found = f"not readable as JSON ({_first_line(error)})"
        raise DataError(str(folder / "config.json"), found, "export or download it again") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise DataError(str(folder / "config.json"), "it names no model_type", "give a model folder in Hugging Face format")
    return str(config["model_type"])


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(error: BaseException) -> str:
    if isinstance(error, StrictDataclassError):  # which field it is about stands on the first line, what is wrong with it below
        return " ".join(str(error).split())
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
