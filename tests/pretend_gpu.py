"""A GPU to test with where there is none: its tensors hold their numbers on the CPU, and mix with no CPU tensor.

Real commands run on it with real numbers, so what a GPU would refuse is refused, and the results must be the CPU's. To
torch's C++ code the tensors are of the "meta" device, which needs no driver; Python sees "cuda:0".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastcoop.engine import kernels

aten = torch.ops.aten
GPU = torch.device("cuda", 0)
MAY_MIX = (aten._to_copy.default, aten.copy_.default)  # they move numbers between devices
TAKES_CPU_INDICES = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
READS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default)


class GpuTensor(Tensor):
    """A tensor that says it is on a GPU. ``inner`` holds its numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> GpuTensor:
        tensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="meta",
        )  # fmt: skip
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_operation(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:
        return GPU

    @property
    def is_cuda(self) -> bool:
        return True

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return self.inner.numpy(force=True)

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(torch.tensor(index) if isinstance(index, list) else index)

    def __setitem__(self, index: Any, value: Any) -> None:
        if isinstance(index, list):  # torch's C++ code would make both tensors
            index, value = torch.tensor(index), torch.full((), value, dtype=self.dtype, device="cuda")
        super().__setitem__(index, value)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def record_stream(self, stream: Any) -> None:
        assert isinstance(stream, Stream)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"GpuTensor({self.inner})"


class Recording:
    """A CUDA graph: the operations of a step, done again on the same memory by ``replay``."""

    current: Recording | None = None

    def __init__(self) -> None:
        self.operations: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        given = _tensors((args, kwargs))
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.setdefault(id(value), (value, value.clone()))
        if isinstance(kwargs.get("out"), Tensor):
            self.before.setdefault(id(kwargs["out"]), (kwargs["out"], kwargs["out"].clone()))
        result = func(*args, **kwargs)
        storages = {tensor.untyped_storage()._cdata for tensor in given}
        made = _tensors(result)
        is_view = not func._schema.is_mutable and all(t.untyped_storage()._cdata in storages for t in made)
        if not (is_view and made):
            self.operations.append((func, args, kwargs, None if func._schema.is_mutable else made))
        return result

    def replay(self) -> None:
        for func, args, kwargs, made in self.operations:
            result = func(*args, **kwargs)
            if made is not None:
                for kept, new in zip(made, _tensors(result), strict=True):
                    kept.copy_(new)

    def pool(self) -> int:
        return id(self)

    @contextmanager
    def record(self, *_: Any, **__: Any) -> Iterator[None]:
        Recording.current = self
        try:
            yield
        finally:
            Recording.current = None
            for tensor, value in reversed(self.before.values()):  # recording runs nothing
                tensor.copy_(value)


class Stream(nullcontext[None]):
    """A CUDA stream. All work is done at once, so nothing waits for it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)


class Event:
    """A CUDA event, by the clock. Copies to the CPU that do not block have arrived when it is synchronized."""

    copies: ClassVar[list[tuple[Tensor, Tensor]]] = []  # not arrived: where to, and the numbers

    def __init__(self, enable_timing: bool = False):
        self.at = 0.0
        self.before: list[tuple[Tensor, Tensor]] = []

    def record(self, stream: Stream | None = None) -> None:
        self.at = time.perf_counter()
        self.before, Event.copies = Event.copies, []

    def synchronize(self) -> None:
        for there, numbers in self.before:
            there.copy_(numbers)

    def elapsed_time(self, later: Event) -> float:
        return 1e3 * (later.at - self.at)


def run_operation(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU; its results are on the GPU if its tensors, or the device it names, are."""
    given = _tensors((args, kwargs))
    on_gpu = any(isinstance(tensor, GpuTensor) for tensor in given)
    assert not any(t.device.type == "meta" for t in given), (
        f"{func}: a tensor was made behind this module's back"
    )
    # A GPU takes a single number from the CPU, but no more.
    mixed = on_gpu and any(not isinstance(tensor, GpuTensor) and tensor.ndim for tensor in given)
    if mixed and func not in MAY_MIX and not (func in TAKES_CPU_INDICES and isinstance(args[0], GpuTensor)):
        raise RuntimeError(
            f"{func}: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
        )
    device = kwargs.get("device")
    to_gpu = on_gpu if device is None else torch.device(device).type in ("meta", "cuda")
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu") if to_gpu else device}
    if "pin_memory" in kwargs:
        kwargs = kwargs | {"pin_memory": False}
    originals = {id(tensor.inner): tensor for tensor in given if isinstance(tensor, GpuTensor)}
    inner_args, inner_kwargs = tree_map(_inner, args), tree_map(_inner, kwargs)
    if Recording.current is not None and (on_gpu or to_gpu):
        if mixed or not to_gpu:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = Recording.current.add(func, inner_args, inner_kwargs)
    else:
        result = func(*inner_args, **inner_kwargs)
    if func is aten.copy_.default:
        if mixed and not isinstance(args[0], GpuTensor) and True in (*args[2:], kwargs.get("non_blocking")):
            Event.copies.append((result, result.clone()))
            result.zero_()
        return args[0]
    if not to_gpu:
        return result
    return tree_map(lambda x: _outer(x, originals), result)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, GpuTensor) else x


def _outer(x: Any, originals: dict[int, GpuTensor]) -> Any:
    if not isinstance(x, Tensor):
        return x
    return originals[id(x)] if id(x) in originals else GpuTensor(x)


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_operation(func, args, kwargs or {})


class _Names(TorchFunctionMode):
    """Give C++ code the device "meta" where Python says "cuda"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = tuple(map(_hidden, args))
        kwargs = {name: _hidden(value) for name, value in (kwargs or {}).items()}
        if (
            func in (torch.tensor, torch.as_tensor) and "device" in kwargs
        ):  # they fill a tensor without an operation
            device = kwargs.pop("device")
            made = func(*args, **kwargs)
            return made if device is None else made.to(device)
        return func(*args, **kwargs)


def _hidden(x: Any) -> Any:
    is_name = isinstance(x, str) and x.startswith("cuda")
    return torch.device("meta") if is_name or (isinstance(x, torch.device) and x.type == "cuda") else x


@contextmanager
def pretend_gpu(free_bytes: int = 10**9) -> Iterator[None]:
    """Give this machine one GPU with ``free_bytes`` of free memory."""

    def nothing(*_: Any, **__: Any) -> None:
        pass

    def plain_context(*_: Any, **__: Any) -> AbstractContextManager[None]:
        return nullcontext()

    overwritten = torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch, _Names(), _Dispatch():
        stand_ins: dict[str, Any] = {
            "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
            "get_device_capability": lambda *_: (7, 0),  # too old for the Triton kernels
            "get_device_name": lambda *_: "pretend GPU", "mem_get_info": lambda *_: (free_bytes, free_bytes),
            "memory_reserved": lambda *_: 0, "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 0,
            "reset_peak_memory_stats": nothing, "synchronize": nothing, "empty_cache": nothing,
            "_lazy_init": nothing,  # of C++ code that is called while _Names is not active, such as in a backward pass
            "current_stream": Stream, "set_stream": nothing, "Stream": Stream, "device": plain_context,
            "stream": plain_context, "CUDAGraph": Recording, "Event": Event, "graph": lambda graph, *_: graph.record(),
        }  # fmt: skip
        for name, stand_in in stand_ins.items():
            patch.setattr(torch.cuda, name, stand_in)
        patch.setattr(kernels, "_run_on", lambda device: False)  # Triton would need a driver
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            yield
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwritten)
