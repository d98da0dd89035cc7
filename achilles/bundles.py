"""Many short calls of a map as one task: what a client does about it.

A task costs some microseconds in each process that it passes through, however it is dispatched; a
call that takes less is better not a task of its own. The items of a `map` whose calls turn out to
be that short travel in *bundles* (`achilles.runtime.bundle`), each of which is one task to
submission, scheduler and agent.

Rules
    1. Nobody can tell: each item has its own outcome, and nothing waits for longer than it would
       alone, but for the few milliseconds that a bundle takes.
    2. Arguments are immutable and plain, or tuples of such, so that it makes no difference when,
       and with what else, they are pickled; and come from a container of the standard library, so
       that taking many of them runs no code of the user's, and does not wait.
    3. A bundle fails where another task is charged (`Options.is_bundle`). If its runner crashed, or
       its worker was lost, that is charged to each of its items that have no outcome, for one of
       them was it: they go out again, each as a task of its own, with two crashes or four losses
       left. When the broker changes, a bundle goes on, or begins again, as any task.
    4. Calls that have options for each attempt (a timeout, retries, at_most_once) are tasks of
       their own, and so are those of tasks that submit tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from achilles.core import protocol as p
from achilles.futures import BLOCK, FAILED, Block, MapRun
from achilles.runtime.bundle import PLAIN, TEXTS
from achilles.runtime.serialize import dumps, dumps_call

if TYPE_CHECKING:
    from achilles.mailbox import Mailbox

BUNDLE_SECONDS = 0.003  # of work in one
SHORT_SECONDS = 5e-5  # a call that takes longer is a task of its own
KNOWN_MIN = 32  # so many calls must have been timed
FIRST_SIZE, SIZE_MAX = 64, 16384
# Bundles, after which one shows how long a call takes among others: a fifth of what it takes alone
TRIALS = 6
BYTES_MAX = 96 << 10  # of arguments
TUPLES_DEEP = 2  # as deep as they are looked into
ELEMENTS_MAX = 1 << 17  # of tuples in one, which is more than `BYTES_MAX` of them
_KINDS = PLAIN | TEXTS
_KINDS_OR_TUPLES = _KINDS | {tuple}
_CONTAINERS = frozenset((list, tuple, range, str, bytes, set, frozenset, dict))


def _are_plain(values: list[Any]) -> bool:
    """Whether all of them are plain, immutable and not large, or tuples of such (or of those)."""
    for _ in range(1 + TUPLES_DEEP):
        try:
            kinds = set(map(type, values))
        except TypeError:  # a class that has no hash
            return False
        if not kinds <= _KINDS_OR_TUPLES:
            return False
        if not kinds.isdisjoint(TEXTS):
            if any(len(one) >= BYTES_MAX for one in values if type(one) in TEXTS):
                return False
        if tuple not in kinds:
            return True
        tuples = {id(one): one for one in values if type(one) is tuple}.values()
        if sum(map(len, tuples)) > ELEMENTS_MAX:
            return False
        values = list(chain.from_iterable(tuples))
    return False


def are_containers(iterables: Sequence[object]) -> bool:
    """Whether their items are there, and taking them runs nobody's code."""
    # Without a look at a hash, which a class can lack
    return bool(iterables) and all(any(type(one) is k for k in _CONTAINERS) for one in iterables)


class Bundler:
    """Cuts the bundles of one map. The user's thread submits;
    the I/O thread takes in what becomes of them.

    ``ids`` are the map's, by index; a bundle is there under its first index that has no outcome.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        run: MapRun,
        ids: dict[int, int],
        single: tuple[p.Group, bytes],
        bundle: tuple[p.Group, bytes],
        size_max: int,
    ) -> None:
        self._mailbox = mailbox
        self.run = run
        self.ids = ids
        self._single = single
        self._bundle = bundle
        self._size_max = size_max
        self._size = FIRST_SIZE
        self.sent = 0  # bundles
        self.is_tried = False  # something came of one
        self.is_cancelled = False

    @property
    def is_known(self) -> bool:
        """Whether enough calls were timed."""
        return self.run.pace.timed >= KNOWN_MIN

    def size(self) -> int:
        """How many items are worth one task; 0 if that is not known, or they take too long."""
        seconds = self.run.pace.seconds
        if not self.is_known or seconds > SHORT_SECONDS:
            return 0
        return min(self._size, self._size_max, 1 + int(BUNDLE_SECONDS / max(seconds, 1e-9)))

    def submit(self, first: int, items: list[tuple[Any, ...]]) -> bool:
        """Submit these items as one task; False if they are not of the kind for that."""
        flat = list(chain.from_iterable(items))
        if not flat or not _are_plain(flat):
            return False
        id = self._mailbox.mark()
        width = len(items[0])
        payload = dumps(((flat, width, id), {}))
        if len(payload) > BYTES_MAX:
            self._size = max(1, len(items) // 2)
        elif self._size < SIZE_MAX and self._size <= len(items):
            self._size *= 2
        self.sent += 1
        self.ids[first] = id
        self._mailbox.submit_bundle(
            id, *self._bundle, payload, BundleSink(self, id, first, flat, width)
        )
        return True

    def again(self, first: int, flat: Sequence[Any], width: int, crashes: int, losses: int) -> None:
        """In the I/O thread: submit each of these items as a task of its own,
        which was charged with so many already.
        """
        group, blob = self._single
        if crashes or losses:
            options = (group.options or p.PLAIN).but(crashes=crashes, losses=losses)
            group = self._mailbox.group(*group._replace(options=options))
        for index, args in enumerate(zip(*[iter(flat)] * width), first):
            if not self.is_cancelled:
                payload = dumps_call(args, {})
                assert type(payload) is bytes
                id = self._mailbox.resubmit(group, blob, payload, self.run, index)
                self.ids[index] = id
                if self.is_cancelled:  # meanwhile, and perhaps without this one
                    self._mailbox.cancelled([id])


class BundleSink:
    """Where a bundle's outcomes go: ``done`` of its items have theirs,
    and those from ``end`` on are other tasks by now.
    """

    __slots__ = ("_bundler", "_done", "_end", "_first", "_flat", "_id", "_width")

    def __init__(self, bundler: Bundler, id: int, first: int, flat: list[Any], width: int) -> None:
        self._bundler = bundler
        self._id = id
        self._first = first
        self._flat = flat
        self._width = width  # arguments of an item
        self._done = 0
        self._end = len(flat) // width

    @property
    def run(self) -> MapRun:
        """The map's outcomes."""
        return self._bundler.run

    def take(self, values: list[Any], others: dict[int, tuple[int, Any]], end: int) -> int:
        """The first items have ended so, and those from ``end`` on will not start;
        how many have an outcome now.
        """
        first, done = self._first, self._done
        self._bundler.is_tried = True
        end = max(end, done)
        if end < self._end:
            self._again(end, self._end)
            self._end = end
        count = min(len(values), self._end)
        if count > done:
            if count < self._end:
                self._bundler.ids[first + count] = self._id
            self._done = count
            some = {at - done: others[at] for at in others if done <= at < count}
            some_values = values if count == len(values) and not done else values[done:count]
            self.run.put(first + done, BLOCK, Block(some_values, some))
        return max(0, count - done)

    def split(self, *, crashes: int = 0, losses: int = 0) -> None:
        """It has no result: what has no outcome yet goes out again; each of it is perhaps why."""
        self._again(self._done, self._end, crashes, losses)
        self._end = self._done

    def _again(self, start: int, end: int, crashes: int = 0, losses: int = 0) -> None:
        width = self._width
        flat = self._flat[start * width : end * width]
        self._bundler.again(self._first + start, flat, width, crashes, losses)

    def resolve(self, value: object, error: BaseException | None) -> None:
        """All that have no outcome end with an error."""
        self.put_error(error)
        self.run.notify()

    def put_error(self, error: BaseException | None) -> None:
        """The same, without telling anybody."""
        for index in range(self._first + self._done, self._first + self._end):
            self._bundler.ids[index] = self._id
            self.run.put(index, FAILED, error)
        self._done = self._end

    def __repr__(self) -> str:
        return f"<BundleSink of {self._end - self._done} items from {self._first + self._done} on>"


def outcomes(block: Block, read: Any) -> Iterator[Any]:
    """The values of a block that has others among them.

    Raises:
        BaseException: whatever an item raised.
    """
    for at, plain in enumerate(block.values):
        if at not in block.others:
            yield plain
            continue
        value, error = read(*block.others[at])
        if error is not None:
            try:
                raise error
            finally:
                del error  # a traceback must not keep its own frame alive
        yield value
