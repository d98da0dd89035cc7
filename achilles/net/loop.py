"""A loop that waits for ZeroMQ sockets and for descriptors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import zmq

from achilles.runtime.loop import Loop

POLLIN, POLLOUT = int(zmq.POLLIN), int(zmq.POLLOUT)  # plain: arithmetic on pyzmq's enums is slow


class SocketLoop(Loop):
    """A `Loop` that waits for ZeroMQ sockets, too.

    libzmq's own poll does the waiting. A socket's descriptor only tells of changes, and any call on
    the socket can use a change up: whoever waits for the descriptor must ask the socket before each
    wait and after each message, and each question costs more in Python than `zmq_poll` as a whole.
    But while a socket lies idle beside pipes, there is nothing to ask: where some were told of
    (`has_pipes`), its descriptor is waited for as any other, until it tells of something, or
    somebody uses a socket (`uses_sockets`).
    """

    def __init__(self) -> None:
        self._callbacks_by_socket: dict[Any, Callable[[], object]] = {}
        self._items: list[tuple[Any, int]] = []
        self.pipes = 0  # pairs
        self.uses_sockets = True  # since they were seen to have nothing; to be set by who does
        super().__init__()

    def watch(
        self, socket: zmq.Socket[bytes], callback: Callable[[], object], *, write: bool = False
    ) -> None:
        """Call ``callback`` when ``socket`` has a message (or takes one, with ``write``);
        again to change that.
        """
        self.unwatch(socket)
        self._callbacks_by_socket[socket] = callback
        self._items.insert(0, (socket, POLLIN | POLLOUT if write else POLLIN))
        self.uses_sockets = True
        if self.pipes:
            super().register(socket.FD, self._use_sockets)

    def unwatch(self, socket: zmq.Socket[bytes]) -> None:
        """Watch ``socket`` no more; before it is closed."""
        if self._callbacks_by_socket.pop(socket, None) is not None:
            self._items = [item for item in self._items if item[0] is not socket]
            super().unregister(socket.FD)

    def has_pipes(self, more: int) -> None:
        """There are so many more pipes, through which messages go instead of through sockets;
        or fewer.
        """
        had_some = self.pipes > 0
        self.pipes += more
        for socket in self._callbacks_by_socket if had_some != (self.pipes > 0) else ():
            if had_some:
                super().unregister(socket.FD)
            else:
                super().register(socket.FD, self._use_sockets)
        self.uses_sockets = True

    def _use_sockets(self) -> None:
        self.uses_sockets = True

    def wait(self, timeout: float | None) -> None:
        """Wait up to ``timeout`` seconds (None: for ever) and call back for what is ready."""
        if self.pipes and not self.uses_sockets:
            self._call_back(self._poller.poll(timeout))
            return
        self.uses_sockets = False
        callbacks = self._callbacks_by_socket
        milliseconds = -1 if timeout is None else math.ceil(timeout * 1000)
        is_file_ready = False
        for ready, _ in zmq.zmq_poll(self._items, milliseconds):
            if type(ready) is int:
                is_file_ready = True
                continue
            self.uses_sockets = True
            callback = callbacks.get(ready)
            if callback is not None:  # None: an earlier one has ended it
                callback()
        if is_file_ready:
            super().wait(0.0)

    def wait_awake(self, timeout: float) -> bool:
        """The same without going to sleep, where there are pipes; whether something was ready."""
        return bool(self.pipes) and not self.uses_sockets and super().wait_awake(timeout)

    def register(self, fd: int, callback: Callable[[], object], *, write: bool = False) -> None:
        super().register(fd, callback, write=write)
        self._watch_files()

    def unregister(self, fd: int) -> None:
        super().unregister(fd)
        self._watch_files()

    def _watch_files(self) -> None:
        self._items = [item for item in self._items if type(item[0]) is not int]
        self._items += [
            (fd, POLLIN | POLLOUT if write else POLLIN) for fd, write in self.pollable().items()
        ]
