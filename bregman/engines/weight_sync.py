"""Moving the learner's weights into rollout engines: what is sent (a handle), who writes it, and how it is read.

Owns the flat shared-memory segment and the handles of weights; works without vLLM and Ray, so that a learner process can import it.
The vLLM side is in `vllm_transfer`. A segment is visible to the processes of one machine; `weight_relay` copies it to others.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import mmap
import os
import socket
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from bregman.errors import ClusterError, DataError

HEADER = struct.Struct("<8sQQ")  # magic, sequence number of the write (0 while it is under way), bytes of tensors
HEADER_BYTES = 64
MAGIC = b"BREGMAN1"
ALIGNMENT = 64
SAMPLES_PER_TENSOR = 64
PREFIX = "bregman-weights-"
SAFETENSORS_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: its Hugging Face checkpoint name, torch dtype name, full shape, and offset in bytes within its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class WeightHandle:
    """Where a full set of weights lies; small, picklable, and the same for every engine of the machine.

    Attributes:
        backend: `shared_memory` (a segment) or `folder` (a Hugging Face folder with safetensors).
        path: the segment, or the folder.
        tensors: every tensor.
        num_bytes: bytes of all tensors.
        sequence: number of the write that made the segment's content; a later write makes this handle stale. 0 for a folder.
        checksum: CRC-32 over sampled elements of every tensor as the writer had them; None for a folder.
        host: the machine that holds the segment.
        node: Ray's id of that node, where it is known.
    """

    backend: Literal["shared_memory", "folder"]
    path: str
    tensors: tuple[TensorSpec, ...]
    num_bytes: int
    sequence: int = 0
    checksum: int | None = None
    host: str = ""
    node: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, as vLLM's weight-transfer interface takes them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WeightHandle:
        tensors = tuple(TensorSpec(t["name"], t["dtype"], tuple(t["shape"]), t["offset"]) for t in data["tensors"])
        return cls(**{**data, "tensors": tensors})


def wire_dtype(name: str, tensor: torch.Tensor, engine: torch.dtype | None) -> torch.dtype:
    """The dtype in which a tensor travels to engines of dtype `engine`; None sends it as it is.

    Matrices travel in the engine's dtype: vLLM would round them to it, just so, on loading. What it may keep in float32 stays as it
    is, and is small: vectors (the bias that balances a router moves by less than bfloat16 can tell) and the matrices of routers.
    """
    if engine is None or not tensor.is_floating_point() or tensor.ndim < 2 or name.endswith("gate.weight"):
        return tensor.dtype
    return engine


class SharedMemoryWriter:
    """Writes all weights of a model into one flat segment, again and again.

    The segment is a file in /dev/shm (in the temporary folder where there is none). It is kept between writes and removed by
    `close` or at the end of the process; segments that killed processes left behind are removed by the next writer.

    Args:
        folder: where to keep the segment; by default /dev/shm.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or _default_folder()
        self._sequence = 0
        self._owner = os.getpid()
        _remove_abandoned(self.folder)
        self._fd, self.path = self._create()
        atexit.register(self.close)

    def write(self, named_tensors: Iterable[tuple[str, torch.Tensor]], *, expected_bytes: int = 0) -> WeightHandle:
        """Write one full set of weights, tensor by tensor; the handle of the write before becomes stale.

        Args:
            named_tensors: Hugging Face checkpoint names with full (gathered) tensors, on any device; taken one by one.
            expected_bytes: about what they will take, to learn before the first one that there is no room.

        Raises:
            ClusterError: no space is left.
        """
        specs: list[TensorSpec] = []
        position, checksum = HEADER_BYTES, 0
        self.begin(expected_bytes)
        for name, tensor in named_tensors:
            flat = tensor.detach().to("cpu").contiguous().reshape(-1)
            specs.append(TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), position))
            checksum = _add_samples(checksum, flat)
            self.put(memoryview(_bytes_of(flat)), position)
            size = flat.numel() * flat.element_size()
            position += -(-size // ALIGNMENT) * ALIGNMENT
        num_bytes = position - HEADER_BYTES
        sequence = self.commit(num_bytes)
        return WeightHandle("shared_memory", self.path, tuple(specs), num_bytes, sequence, checksum, socket.gethostname())

    def begin(self, num_bytes: int) -> None:
        """Start a write of `num_bytes`: what the segment holds is no longer valid.

        Raises:
            ClusterError: the folder has no room for that much.
        """
        if self._fd < 0:
            raise RuntimeError("the writer is closed")
        system = os.statvfs(self.folder)
        free = system.f_bavail * system.f_frsize + os.fstat(self._fd).st_blocks * 512  # what the segment has already is its own
        if num_bytes > free:
            raise self._no_space(f"{num_bytes:,} bytes of weights do not fit, {free:,} are free")
        self.put(HEADER.pack(MAGIC, 0, 0), 0)

    def put(self, data: bytes | memoryview, position: int) -> None:
        """Write `data` at an offset of the segment. `pwrite` rather than a mapping: a full tmpfs is then an error and not a SIGBUS.

        Raises:
            ClusterError: no space is left.
        """
        data = memoryview(data)
        try:
            while data:
                written = os.pwrite(self._fd, data, position)
                data, position = data[written:], position + written
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise self._no_space(f"no space left for the weights ({position / 2**20:.0f} MiB written)") from error

    def commit(self, num_bytes: int) -> int:
        """Declare the segment whole; the number of this write."""
        self._sequence += 1
        if os.fstat(self._fd).st_size < HEADER_BYTES + num_bytes:  # never shorter: a reader may still have it mapped
            os.truncate(self._fd, HEADER_BYTES + num_bytes)
        self.put(HEADER.pack(MAGIC, self._sequence, num_bytes), 0)
        return self._sequence

    def close(self) -> None:
        """Remove the segment; calling it again does nothing."""
        if self._fd < 0:
            return
        atexit.unregister(self.close)
        if os.getpid() == self._owner:  # a forked child has no say
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        os.close(self._fd)
        self._fd = -1

    def _no_space(self, found: str) -> ClusterError:
        fix = "free some space there or give it more (for a container: --shm-size)"
        return ClusterError(f"{socket.gethostname()}: {self.folder}", found, fix)

    def _create(self) -> tuple[int, str]:
        """A new file that this process holds a lock on: a file of that name without a lock has lost its writer."""
        while True:
            try:
                fd, path = tempfile.mkstemp(prefix=PREFIX, dir=self.folder)
            except OSError as error:
                raise ClusterError(str(self.folder), f"cannot keep weights there ({error.strerror})", "make it writable") from error
            fcntl.flock(fd, fcntl.LOCK_EX)
            try:
                if os.stat(path).st_ino == os.fstat(fd).st_ino:
                    return fd, path
            except FileNotFoundError:
                pass  # another writer took it for abandoned before the lock was on
            os.close(fd)


def folder_handle(path: Path) -> WeightHandle:
    """The weights of a Hugging Face folder, as a handle; reads the headers of its safetensors files only.

    Raises:
        DataError: no safetensors there, or a file is damaged.
    """
    files = weight_files(path)
    specs = [spec for file in files for spec in _safetensors_specs(file)]
    return WeightHandle(backend="folder", path=str(path), tensors=tuple(specs), num_bytes=sum(_num_bytes(s) for s in specs))


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, else all.

    Raises:
        DataError: there is none.
    """
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [path / name for name in names]
    else:
        files = sorted(path.glob("*.safetensors"))
    missing = [file.name for file in files if not file.exists()]
    if missing or not files:
        found = f"{missing[0]} is missing" if missing else "no *.safetensors file in this folder"
        raise DataError(str(path), found, "give a complete model folder in Hugging Face format")
    return files


def read_tensors(handle: WeightHandle) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a handle, in order, without a copy; copy what you keep beyond the next write.

    Raises:
        ClusterError: the segment is gone, was overwritten by a later write, or does not hold what the writer wrote.
    """
    if handle.backend == "folder":
        yield from _read_folder(Path(handle.path))
        return
    with _open_segment(handle) as fd:
        check_current(handle, fd)
        size = HEADER_BYTES + handle.num_bytes
        # A private mapping: torch wants writable memory, and nothing written by mistake reaches the other engines.
        buffer = mmap.mmap(fd, size, access=mmap.ACCESS_COPY)
        checksum = 0
        for spec in handle.tensors:
            tensor = _view(buffer, spec)
            checksum = _add_samples(checksum, tensor.reshape(-1))
            yield spec.name, tensor
        check_current(handle, fd)
    if checksum != handle.checksum:
        raise ClusterError(handle.path, f"weights read differ from weights written (checksum {checksum}, not {handle.checksum})")


def check_current(handle: WeightHandle, fd: int | None = None) -> None:
    """Check that a segment still holds what `handle` describes; a folder always does.

    Raises:
        ClusterError: it is gone, half written, or overwritten.
    """
    if handle.backend == "folder":
        return
    if fd is None:
        with _open_segment(handle) as opened:
            return check_current(handle, opened)
    header = os.pread(fd, HEADER.size, 0)
    magic, sequence, num_bytes = HEADER.unpack(header) if len(header) == HEADER.size else (b"", 0, 0)
    if (magic, sequence, num_bytes) != (MAGIC, handle.sequence, handle.num_bytes):
        found = f"the segment holds write {sequence}, not write {handle.sequence}"
        raise ClusterError(handle.path, found, "a handle is good until the next publish; publish again")


def read_bytes(handle: WeightHandle, position: int, count: int) -> Any:
    """`count` bytes at an offset of a segment, as a view of it: uint8 [count], numpy. Copy them before the next write.

    Raises:
        ClusterError: the segment is gone or was overwritten.
    """
    import numpy

    with _open_segment(handle) as fd:
        check_current(handle, fd)
        mapped = mmap.mmap(fd, HEADER_BYTES + handle.num_bytes, access=mmap.ACCESS_READ)
    return numpy.frombuffer(mapped, numpy.uint8, count, position)


def sample_indices(count: int) -> torch.Tensor:
    """Positions of the elements that checks look at: evenly spread over `count` elements, the last one included. int64."""
    return torch.linspace(0, max(count - 1, 0), min(count, SAMPLES_PER_TENSOR), dtype=torch.float64).round().long()


def _view(buffer: mmap.mmap, spec: TensorSpec) -> torch.Tensor:
    dtype = getattr(torch, spec.dtype)
    count = _count(spec)
    if count == 0:
        return torch.empty(spec.shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=spec.offset).reshape(spec.shape)


def _add_samples(checksum: int, flat: torch.Tensor) -> int:
    return zlib.crc32(memoryview(_bytes_of(flat[sample_indices(flat.numel())])), checksum)


def _bytes_of(flat: torch.Tensor) -> Any:
    return flat.contiguous().view(torch.uint8).numpy() if flat.numel() else b""


@contextlib.contextmanager
def _open_segment(handle: WeightHandle) -> Iterator[int]:
    try:
        fd = os.open(handle.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        here = socket.gethostname()
        found = "the learner that wrote it is gone" if handle.host == here else f"it is on {handle.host}, this engine on {here}"
        raise ClusterError(handle.path, f"no such weight segment; {found}", "set engine.weight_sync to `auto`") from None
    try:
        yield fd
    finally:
        os.close(fd)


def _read_folder(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    for file in weight_files(path):
        try:
            with safe_open(str(file), framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    yield name, opened.get_tensor(name)
        except SafetensorError as error:
            raise DataError(str(file), f"not a readable safetensors file ({error})", "export or download it again") from error


def _safetensors_specs(file: Path) -> list[TensorSpec]:
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
        header.pop("__metadata__", None)
        return [
            TensorSpec(name, SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
        ]
    except (OSError, struct.error, ValueError, KeyError, OverflowError, MemoryError) as error:
        raise DataError(str(file), f"not a readable safetensors file ({error})", "export or download it again") from error


def _count(spec: TensorSpec) -> int:
    count = 1
    for length in spec.shape:
        count *= length
    return count


def _num_bytes(spec: TensorSpec) -> int:
    return _count(spec) * getattr(torch, spec.dtype).itemsize


def _default_folder() -> Path:
    shared = Path("/dev/shm")
    return shared if os.access(shared, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())


def _remove_abandoned(folder: Path) -> None:
    """Remove segments that no process holds a lock on: their writers were killed."""
    for path in folder.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(fd)
