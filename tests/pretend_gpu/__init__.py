"""A GPU that is not there: tensors that say they live on ``cuda:N`` while their numbers are on the CPU.

    log = pretend_gpu.Log()
    pretend_gpu.move(model, "cuda:0")
    with pretend_gpu.pretending(log):
        answer = model.generate(...)
    log.syncs, log.copies, log.kernels        # by the line that caused them

An operation over two devices raises ``MixedDevices``, as it would on a GPU. Counted are what the host waits for
(``item``, ``tolist``, ``bool``, a copy to the CPU, indexing with a mask), copies from the host, and kernels. The
numbers are the CPU's, so an answer must equal the CPU's; backward passes and CUDA's own arithmetic are not seen.
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

VIEWS = set(
    "view _unsafe_view permute transpose t expand select slice unsqueeze squeeze detach alias as_strided split "
    "split_with_sizes unbind reshape _reshape_alias lift_fresh unfold diagonal".split()
)
"""Operations that start no kernel."""

WAITS = set("_local_scalar_dense nonzero masked_select equal is_nonzero _unique2 bincount".split())
"""Operations whose result the host needs before it can go on."""

PLAIN_RESULTS = {"_local_scalar_dense", "equal", "is_nonzero"}


class MixedDevices(RuntimeError):
    """One operation over tensors of two devices."""


class Log:
    """What happened: ``syncs``, ``copies`` (host to device) and ``kernels``, each counted by line."""

    def __init__(self):
        self.syncs, self.copies, self.kernels = Counter(), Counter(), Counter()

    def __repr__(self):
        kinds = {"syncs": self.syncs, "copies": self.copies, "kernels": self.kernels}
        return "\n".join(
            f"{name} {sum(found.values())}: {dict(found.most_common(20))}" for name, found in kinds.items()
        )

    def of(self, counter, *files):
        """How many of ``counter`` were caused in some of ``files`` (parts of their paths)."""
        return sum(count for line, count in counter.items() if any(file in line for file in files))


_LOG = Log()


def _line():
    """The innermost line of the project, else of transformers' generation, that is being run."""
    stack = traceback.extract_stack()
    for mark, start in (("/llava/", "/llava/"), ("transformers/generation/", "transformers/")):
        for frame in reversed(stack):
            if mark in frame.filename and "/tests/" not in frame.filename:
                return f"{frame.filename.split(start)[-1]}:{frame.lineno}"
    return "elsewhere"


def _kernel():
    _LOG.kernels[_line()] += 1


def _copy():
    _LOG.copies[_line()] += 1


def _wait():
    _LOG.syncs[_line()] += 1


def _waiting(name):
    """A method of a tensor that gives the host a number."""

    def method(self, *args):
        _wait()
        return getattr(self.numbers, name)(*args)

    return method


def _launching(name):
    def method(self, *args, **kwargs):
        _kernel()
        return OnGpu(getattr(self.numbers, name)(*map(_real, args), **kwargs), self.device)

    return method


class OnGpu(torch.Tensor):
    """``numbers``'s numbers, on ``device``."""

    @staticmethod
    def __new__(cls, real, device):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            layout=real.layout,
            device=torch.device(device),
        )
        made.numbers = real
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __repr__(self):
        return f"OnGpu({self.device}, {tuple(self.numbers.shape)}, {self.numbers.dtype})"

    # What torch does below the level at which operations are seen.
    for _name in ("tolist", "item", "numpy", "__int__", "__float__", "__bool__", "__index__"):
        locals()[_name] = _waiting(_name)
    for _name in ("any", "all", "__invert__", "__and__", "__or__", "__rand__", "__ror__"):
        locals()[_name] = _launching(_name)

    def cpu(self):
        _wait()
        return self.numbers

    def nonzero(self, **kwargs):
        _wait()
        return OnGpu(self.numbers.nonzero(**kwargs), self.device)

    def contiguous(self, memory_format=torch.contiguous_format):
        if self.numbers.is_contiguous():
            return self
        _kernel()
        return OnGpu(self.numbers.contiguous(), self.device)

    def __getitem__(self, index):
        place, moves = self._place(index)
        if moves:
            _kernel()
        return OnGpu(self.numbers[place], self.device)

    def __setitem__(self, index, value):
        place, _ = self._place(index)
        _kernel()
        if isinstance(value, OnGpu) and value.device != self.device:
            raise MixedDevices(f"setitem: tensors on {value.device} and {self.device} at {_line()}")
        if isinstance(value, torch.Tensor) and not isinstance(value, OnGpu) and value.dim():
            _copy()
        self.numbers[place] = _real(value)

    def _place(self, index):
        """An index on the host, and whether it takes a kernel."""
        parts = index if isinstance(index, tuple) else (index,)
        for part in parts:
            if isinstance(part, OnGpu):
                if part.device != self.device:
                    raise MixedDevices(f"index on {part.device} into {self.device} at {_line()}")
                if part.numbers.dtype == torch.bool:
                    _wait()
            elif isinstance(part, list) or (isinstance(part, torch.Tensor) and part.dim()):
                _copy()
        place = tuple(map(_real, parts))
        return place if isinstance(index, tuple) else place[0], any(isinstance(p, (list, torch.Tensor)) for p in parts)


def _real(value):
    return value.numbers if isinstance(value, OnGpu) else value


def _target(device):
    """The GPU that a ``device=`` argument names; ``None`` for the CPU."""
    device = torch.device(device)
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else None


def _run(func, args, kwargs):
    """One operation: checked, counted, done on the CPU."""
    name, asked = func.overloadpacket.__name__, kwargs.get("device")
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    target = None if asked is None else _target(asked)
    if target is not None:
        kwargs["device"] = torch.device("cpu")
    flat = tree_flatten((args, kwargs))[0]
    gpu = [value for value in flat if isinstance(value, OnGpu)]
    source = gpu[0].device if gpu else None
    if name == "_to_copy":
        return _moved(func, args, kwargs, source, target, asked)
    if name == "copy_":
        return _filled(*args[:2])
    if gpu:
        _check(name, args, flat, source)
    if gpu and name in WAITS:
        _wait()
    indices = args[1] or [] if name in ("index", "index_put_", "_index_put_impl_") else []
    if gpu and any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices):
        _wait()
    made = func(*tree_map(_real, args), **tree_map(_real, kwargs))
    where = target or source
    if where is None or name in PLAIN_RESULTS:
        return made
    if name not in VIEWS:
        _kernel()
    if name.endswith("_") and not name.startswith("_") and isinstance(args[0], OnGpu):
        return args[0]
    return tree_map(lambda value: OnGpu(value, where) if isinstance(value, torch.Tensor) else value, made)


def _moved(func, args, kwargs, source, target, asked):
    """``to``: a copy to the GPU, to the host, or a cast where it is."""
    made = func(*tree_map(_real, args), **kwargs)
    if source is not None and asked is not None and target is None:
        _wait()
        return made
    where = target or source
    if where is None:
        return made
    if source is None:
        _copy()
    else:
        _kernel()
    return OnGpu(made, where)


def _filled(into, value):
    if isinstance(into, OnGpu) and not isinstance(value, OnGpu):
        _copy()
    elif not isinstance(into, OnGpu) and isinstance(value, OnGpu):
        _wait()
    else:
        _kernel()
    _real(into).copy_(_real(value))
    return into


def _check(name, args, flat, source):
    """Raise where an operation would mix devices; numbers without a dimension may come from the host."""
    for value in flat:
        if isinstance(value, OnGpu) and value.device != source:
            raise MixedDevices(f"{name}: tensors on {source} and {value.device} at {_line()}")
    host = [v for v in flat if isinstance(v, torch.Tensor) and not isinstance(v, OnGpu) and v.dim()]
    if not host:
        return
    if name in ("index", "index_put_", "index_put", "_index_put_impl_") and isinstance(args[0], OnGpu):
        _copy()
        return
    shapes = [tuple(value.shape) for value in host]
    raise MixedDevices(f"{name}: tensors on {source} and on the CPU {shapes} at {_line()}")


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


@contextlib.contextmanager
def pretending(log):
    """A machine with GPUs, without gradients; what happens on them goes into ``log``."""
    global _LOG
    before, make, init = _LOG, torch.tensor, torch.cuda._lazy_init

    def tensor(data, *, dtype=None, device=None, **more):
        target = None if device is None else _target(device)
        if target is None:
            return make(data, dtype=dtype, device=device, **more)
        _copy()
        return OnGpu(make(data, dtype=dtype), target)

    _LOG, torch.tensor, torch.cuda._lazy_init = log, tensor, lambda: None
    try:
        with torch.no_grad(), _Mode():
            yield log
    finally:
        _LOG, torch.tensor, torch.cuda._lazy_init = before, make, init


def move(module, device):
    """Put the parameters and buffers of a module on a GPU, those that are not on one yet."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None and not isinstance(value.data, OnGpu):
                part._parameters[name] = torch.nn.Parameter(OnGpu(value.data, device), requires_grad=False)
        for name, value in part._buffers.items():
            if value is not None and not isinstance(value, OnGpu):
                part._buffers[name] = OnGpu(value, device)
