"""Values to bytes and back: what tasks are called with, and what they return.

A payload's first byte says its form::

    0x80   a pickle
    0x01   a pickle with buffers:   01, <I n>, (n+1) times <Q size>, the pickle, then n buffers,
    each aligned to 64 0x02   a call with its function: 02, <I size>, the function's pickle of that
    size, a payload of the above 0x03   a pickle that refers to what travelled before;
    see `achilles.runtime.arguments`

Plain pickle is tried first, because it is several times faster. cloudpickle takes what plain pickle
cannot, and whatever names a module of the program's own
(see `achilles.runtime.program`) or one registered by value.

Buffers of 128 KiB and more (pickle protocol 5: NumPy arrays and the like) stay out of the pickle.
They are copied once, into memory that the other process maps; there they are writable,
and private to it.

A runner imports this module: what it does not need at once is imported late.
"""

from __future__ import annotations

import sys
from _pickle import dumps as _dumps
from _pickle import loads as _loads
from _struct import Struct
from io import TextIOWrapper
from types import BuiltinFunctionType, FunctionType, ModuleType

from achilles.runtime.program import NAMES, names_own

TYPE_CHECKING = False  # as type checkers know it; importing typing takes longer than all the rest
if TYPE_CHECKING:
    from collections.abc import Callable
    from pickle import PickleBuffer
    from typing import Any, TypeAlias

    from achilles.runtime.arguments import ArgumentTable, Attached, Resolve

    Unpickle: TypeAlias = Callable[..., Any]

VALUE = 0  # the statuses of a result; achilles.core.protocol has the same for the wire
ERROR = 1
INIT_FAILED = 2

# A plain pickle of what is in there has the numbers of its descriptors
HANDLES = b"multiprocessing.connection"
LARGE = 128 * 1024  # from here on sharing memory beats copying (measured)
REPR_MAX = 200

Buffer: TypeAlias = "bytes | bytearray | memoryview"
# One buffer, or several whose value is their concatenation
Encoded: TypeAlias = "bytes | list[Buffer]"

_PICKLE, _BUFFERS, _INLINE, SHARING = 0x80, 0x01, 0x02, 0x03
SHARE_MIN = 1 << 20  # arguments of so many bytes are looked at, whether they were given before
ALIGN = 64
_LENGTH = Struct("<I")
_NOTHING: set[str] = set()
_registered: set[str] | None = None  # see by_value_modules


class _LargeBuffer(Exception):
    """There is a buffer to be kept out of the pickle."""


def _keep_small(buffer: PickleBuffer) -> bool:
    if buffer.raw().nbytes >= LARGE:
        raise _LargeBuffer
    return True


# --- Values to bytes ------------------------------------------------------------------------------


def dumps(obj: object, *, is_result: bool = False) -> bytes:
    """One pickle of ``obj``, by whichever pickler is right for it;
    ``is_result``: it is what a task ended with.

    Raises:
        Exception: whatever the pickler or the object's own methods raise;
            RecursionError if it is too deep.
    """
    return pickle_with(obj, None, is_result=is_result)


def encode(obj: object, *, is_result: bool = False) -> Encoded:
    """A payload of ``obj``; its large buffers are not copied yet,
    so it is to be used before they change.

    Raises:
        Exception: as `dumps` does.
    """
    try:
        data = _dumps(obj, 5, buffer_callback=_keep_small)
        if is_plain(data):
            return data
    except Exception:
        pass  # the careful way says what is wrong, or does it
    buffers: list[memoryview] = []
    data = pickle_with(obj, buffers, is_result=is_result)
    return lay_out(data, buffers) if buffers else data


def pickle_with(obj: object, buffers: list[memoryview] | None, *, is_result: bool = False) -> bytes:
    """A pickle of ``obj``; its large buffers are put into the list, if there is one, instead.

    Raises:
        Exception: as `dumps` does.
    """
    try:
        data = _dumps(obj, 5, buffer_callback=keeper(buffers))
        if is_plain(data):
            return data
    except RecursionError:
        raise
    except Exception:
        pass  # cloudpickle can more; if it cannot, its error is as good
    from achilles.runtime import by_value

    return by_value.dumps(obj, keeper(buffers), is_result=is_result)


def keeper(buffers: list[memoryview] | None) -> Callable[[PickleBuffer], bool] | None:
    """A new attempt's ``buffer_callback``: it puts large buffers into the list,
    which is empty again.
    """
    if buffers is None:
        return None
    buffers.clear()

    def keep(buffer: PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < LARGE:
            return True
        buffers.append(view)
        return False

    return keep


def is_plain(data: bytes) -> bool:
    """Whether the other process finds all that the pickle names."""
    if NAMES not in data:
        return True
    if data.find(HANDLES) >= 0 or names_own(data):
        return False
    modules = by_value_modules() if _registered is None else _registered
    return not modules or not any(name.encode() in data for name in modules)


def by_value_modules() -> set[str]:
    """The modules that the user registered with cloudpickle to travel by value."""
    global _registered
    if _registered is not None:
        return _registered
    cloudpickle = sys.modules.get("cloudpickle.cloudpickle")
    if cloudpickle is None:
        return _NOTHING
    if getattr(getattr(cloudpickle, "__spec__", None), "_initializing", False):
        return _NOTHING  # another thread imports it, so that nothing can be registered yet
    modules = getattr(cloudpickle, "_PICKLE_BY_VALUE_MODULES", None)
    if isinstance(modules, set):
        _registered = modules  # cloudpickle's own set, which it changes and never replaces
        return modules
    return cloudpickle.list_registry_pickle_by_value()  # type: ignore[no-any-return]


def lay_out(data: bytes, buffers: list[memoryview]) -> list[Buffer]:
    """The parts of a payload with buffers."""
    sizes = [len(data), *(buffer.nbytes for buffer in buffers)]
    head = Struct(f"<BI{len(sizes)}Q").pack(_BUFFERS, len(buffers), *sizes)
    parts: list[Buffer] = [head, data]
    at = len(head) + len(data)
    for buffer in buffers:
        padding = -at % ALIGN
        parts += (bytes(padding), buffer)
        at += padding + buffer.nbytes
    return parts


def dumps_call(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    fn: object = None,
    table: ArgumentTable | None = None,
) -> bytes | memoryview | Attached:
    """The payload of a call, with the arguments' values of this moment.

    It is a memoryview where it has buffers. With a ``table``, large arguments may be attached to it
    instead, and memory is the table's.

    Raises:
        ArgumentPickleError: an argument (it is named, with ``fn``) cannot be pickled.
    """
    # What probably has large parts is not tried in the way that would find that out.
    if table is None or not (
        table.expects_buffers or (table.is_watching and table.has_large(args, kwargs))
    ):
        try:
            data = _dumps((args, kwargs), 5, buffer_callback=_keep_small)
            if NAMES not in data or is_plain(data):
                if len(data) < SHARE_MIN or table is None or not table.has_large(args, kwargs):
                    return data
        except (Exception, SystemExit):
            pass  # the careful way says what is wrong, or does it
    try:
        encoded = encode((args, kwargs)) if table is None else table.encode((args, kwargs))
    except (Exception, SystemExit) as error:
        from achilles.runtime.blame import argument_error

        is_far = table is not None and table.is_far
        made = argument_error(args, kwargs, fn, error, is_far=is_far)
        raise made from made.__cause__
    _warn_of_files((*args, *kwargs.values()), fn)
    if not isinstance(encoded, list):
        return encoded
    if table is not None:
        return table.store_call(encoded)
    from achilles.runtime.shared import store

    return store(encoded)


def join_inline(function: bytes, payload: bytes | memoryview) -> bytes:
    """A call that brings its function along."""
    if type(payload) is not bytes:
        function += bytes(-(5 + len(function)) % ALIGN)  # unpickling stops before it
    return b"".join((b"\x02", _LENGTH.pack(len(function)), function, payload))


def dump_result(value: object, call: object) -> tuple[int, Encoded]:
    """The status and payload of what ``call`` returned; an ERROR if the value cannot be pickled."""
    try:
        data = _dumps(value, 5, buffer_callback=_keep_small)
        if NAMES not in data or is_plain(data):
            return VALUE, data
    except BaseException:
        pass  # the careful way says what is wrong, or does it
    try:
        return VALUE, encode(value, is_result=True)
    except BaseException as error:
        from achilles.runtime.tracebacks import dump_error
        from achilles.task_errors import ResultPickleError

        text = f"the value returned by {describe(call)} cannot be pickled: {why(error)}"
        failure = ResultPickleError(
            f"{text} (it is {_short_repr(value)}); return what it can be made from instead"
        )
        return ERROR, dump_error(failure)


# --- Bytes to values ------------------------------------------------------------------------------


def loads(payload: Any, resolve: Resolve | None = None, unpickle: Unpickle = _loads) -> Any:
    """The value of a payload: bytes, or any buffer, or a tuple or list of them to be read as one.

    Buffers in it are writable and not shared with anybody. ``resolve`` finds what it refers to.
    ``unpickle`` takes a pickle and, as ``buffers``, those that are not in it.

    Raises:
        BaseException: whatever the objects' own methods raise.
    """
    if payload[0] == _PICKLE:
        return unpickle(payload)
    return _loads_buffers(one_view(payload), resolve, unpickle)


def one_view(payload: Any) -> memoryview:
    """The payload's bytes as one view of them."""
    if not isinstance(payload, tuple | list):
        return memoryview(payload)
    if len(payload) == 1:
        return memoryview(payload[0]).cast("B")
    from achilles.runtime.shared import whole

    memory = whole(payload)
    return memoryview(bytearray().join(payload) if memory is None else memory)


def _loads_buffers(view: memoryview, resolve: Resolve | None, unpickle: Unpickle) -> Any:
    if view[0] == SHARING and resolve is not None:
        from achilles.runtime.arguments import loads_attached

        return loads_attached(view, resolve)
    if view[0] != _BUFFERS:
        return unpickle(view)
    (count,) = _LENGTH.unpack_from(view, 1)
    size, *sizes = Struct(f"<{count + 1}Q").unpack_from(view, 5)
    at = 5 + 8 * (count + 1)
    data = view[at : at + size]
    at += size
    buffers: list[Buffer] = []
    for size in sizes:
        at += -at % ALIGN
        part = view[at : at + size]
        buffers.append(bytearray(part) if part.readonly else part)
        at += size
    return unpickle(data, buffers=buffers)


def split_inline(payload: Any, resolve: Resolve | None = None) -> tuple[Any, Any]:
    """The function of a call that brings it along, and the rest of the payload."""
    view = one_view(payload)
    if view[0] != _INLINE:
        raise ValueError("a call without its function")
    (size,) = _LENGTH.unpack_from(view, 1)
    return loads(view[5 : 5 + size], resolve), view[5 + size :]


def load_outcome(status: int, payload: Any) -> tuple[Any, BaseException | None]:
    """What a task returned, or the exception it ended with (its cause has the remote traceback)."""
    try:
        load = getattr(payload, "load", None)  # of one that is guarded
        outcome = loads(payload) if load is None else load()
        if status == VALUE:
            return outcome, None
        exception, text = outcome
        return None, _with_cause(exception, text)
    except BaseException as error:
        from achilles.task_errors import ResultUnpickleError

        what = "a task's result" if status == VALUE else "the exception that a task raised"
        failure = ResultUnpickleError(
            f"{what} cannot be unpickled here: {why(error)}; this program must have its class as the worker has it"
        )
        failure.__cause__ = error
        return None, failure


def _with_cause(exception: Any, text: str) -> BaseException:
    from concurrent.futures.process import _RemoteTraceback

    if not isinstance(exception, BaseException):
        raise TypeError(f"{type(exception).__name__} is not an exception")
    cause: BaseException = _RemoteTraceback(f'\n"""\n{text}"""')  # type: ignore[arg-type]
    exception.__cause__ = cause
    return exception


# --- Names and errors -----------------------------------------------------------------------------


def is_stateless(call: object) -> bool:
    """Whether many tasks may share one object: a plain function, a builtin or a class."""
    if isinstance(call, BuiltinFunctionType):
        return call.__self__ is None or isinstance(call.__self__, ModuleType)
    return isinstance(call, FunctionType | type)


def describe(call: object) -> str:
    """How a callable is named in messages: ``train()``."""
    name = getattr(call, "__qualname__", None) or getattr(call, "__name__", None)
    if not isinstance(name, str):
        inner = getattr(call, "func", None)  # functools.partial
        return describe(inner) if inner is not None else f"{type(call).__qualname__} object"
    return f"{name}()"


def _short_repr(value: object) -> str:
    """The type and the beginning of the representation."""
    try:
        text = repr(value)
    except BaseException as error:
        text = f"<its repr() raised {type(error).__name__}>"
    if len(text) > REPR_MAX:
        text = f"{text[: REPR_MAX - 1]}…"
    return f"of type {type(value).__qualname__}: {text}"


def why(error: BaseException) -> str:
    if isinstance(error, RecursionError) or "recursion" in str(error):
        return "nested too deeply to pickle"
    return str(error) or type(error).__name__


def _warn_of_files(values: tuple[Any, ...], fn: object) -> None:
    """cloudpickle takes an open text file for its content, which is seldom what is wanted."""
    for value in values:
        if isinstance(value, TextIOWrapper):
            import warnings

            whose = f", an argument of {describe(fn)}," if fn is not None else ""
            text = (
                f"the open file {value.name!r}{whose} was copied by content; pass its name instead"
            )
            warnings.warn(text, stacklevel=4)
