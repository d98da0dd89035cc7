"""What waits at one worker while another has nothing to do: it is called back.

Theory
    Tasks are sent together, or ahead of a slot, because they are taken to be short. Where one is
    not, others wait behind it. A worker sees to that among its own runners (see `agent`);
    here it is seen to among workers.

    A lease is looked at when it has shown nothing for `RELIEF_SECONDS`, the longest silent first,
    and asked for what it has not started, once until it shows something. A runner that has never
    shown anything does not answer that: it may be starting, and its worker sees to it.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice

from achilles.core import protocol as p
from achilles.core.tables import Lease, Places, Send

# A place is free, and no work for it on its way; a worker helps itself after half of that
RELIEF_SECONDS = 0.01
PAUSE_MAX = 0.03  # between looks that find nothing which is wanted elsewhere
LOOKS_MAX = 64  # leases looked at in one go


class Relief:
    """Leases of which something may wait, and when to look at them;
    ``idle`` are the workers with a free slot.
    """

    def __init__(self, idle: Places) -> None:
        self._idle = idle
        self.workers = 0  # how many there are
        self._shown: OrderedDict[Lease, float] = OrderedDict()  # when each has shown something last
        self.due: float | None = None  # when `tick` wants to be called
        self._pause = RELIEF_SECONDS

    def note(self, lease: Lease, now: float) -> None:
        """The lease is new, or a result of it has come."""
        if lease.left > 1 or not lease.in_slot:
            self._shown[lease] = now
            self._shown.move_to_end(lease)
        else:
            self._shown.pop(lease, None)

    def forget(self, lease: Lease) -> None:
        """The lease has ended."""
        self._shown.pop(lease, None)

    def plan(self, now: float) -> None:
        """All that could be was given out: note when to look whether some of it waits beside a free
        slot.
        """
        if self.workers < 2 or not self._idle or not self._shown:
            self.due = None
        elif self.due is None:
            self.due = now + self._pause

    def tick(self, now: float) -> list[Send]:
        """Call back what waits, from as many leases as there are free slots."""
        if self.due is None or now < self.due:
            return []
        self.due = None
        free = sum(
            worker.slots - worker.taken
            for group in self._idle.values()
            for worker in islice(group.values(), LOOKS_MAX)
        )
        sends: list[Send] = []
        for lease, shown_at in list(islice(self._shown.items(), LOOKS_MAX)):
            at = shown_at + RELIEF_SECONDS
            if len(sends) == free or now < at:
                self.due = max(at, now + RELIEF_SECONDS)
                break
            del self._shown[lease]
            if lease.left == 1 and (lease.in_slot or lease.is_lent):
                continue  # it has started
            if self._is_wanted_elsewhere(lease):
                sends.append(Send(lease.worker.peer, p.Revoke(lease.number, [])))
            else:
                self._shown[lease] = now
        self._pause = RELIEF_SECONDS if sends else min(2 * self._pause, PAUSE_MAX)
        self.plan(now)
        return sends

    def _is_wanted_elsewhere(self, lease: Lease) -> bool:
        """Whether another worker may run the lease's tasks now."""
        client = lease.client
        root = client.root
        places = root.places - (not lease.in_slot)  # it would have one less
        if client.found is not None or client.is_held_back or root.is_held:
            # After a change of brokers, or too many results: it would not be given out again
            return False
        if lease.is_lent or 0 < root.slots_max <= places:
            return False
        wanted, peer = lease.queue.options.tags, lease.worker.peer
        return any(
            tags.issuperset(wanted) and (len(group) > 1 or peer not in group)
            for tags, group in self._idle.items()
        )

    def check_invariants(self, leases: list[Lease]) -> None:
        """Assert the rules of this module; tests call it after every step."""
        assert self._shown.keys() <= set(leases), "a lease is looked at that has ended"
