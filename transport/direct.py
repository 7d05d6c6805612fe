"""
Published weights that go from device to device, without the host's memory.

The learner keeps the two newest versions on its own device, each in one flat buffer. Rollout
workers fetch them from there, one parcel of consecutive tensors at a time, whenever they look for
new weights. Clock, checksums and log-probs of the probe lie in shared memory (versions.py).

Who sends what, and when
    publish     the learner writes the older of its buffers, waits for its device, and sets the
                clock. It sends nothing, and waits for no rollout worker.
    connect     a rollout worker that reads for the first time connects to a socket of the learner.
                The learner answers with the name of a file; through it both make a pair (pair.py).
    fetch       the rollout worker begins to receive and then sends 16 bytes, the half and the
                number of the parcel. A thread of the learner, one for each connection, sends it.
    which one   the half of the version that the reader has chosen: the newest, or the one asked
                for. If the learner has begun to overwrite it, the clock says so, and the reader
                reads again, as with shared memory. No reader keeps a mixture.
    lost peer   the socket of a dead rollout worker is closed by the kernel. Its thread gives the
                pair up and ends; a successor makes a new connection. A peer that neither dies nor answers is
                given up after pair.LIMIT_S, and may connect again. A rollout worker that has lost
                the learner connects again a few times, and then fails.

Why threads beside the training are safe with NCCL
    NCCL warns of several communicators on one device: a transfer occupies the GPU until its other
    end runs, and two that wait for each other never end. Here they form a star. Every pair shares
    one GPU, the learner's, with the learners' communicator and none with another pair, and a
    rollout worker has begun to receive before the learner is asked to send. So a transfer waits for
    no work of a learner, in whatever order a GPU begins its work, and every wait ends. This is
    reasoning: it has not run on GPUs.
    A rollout worker that dies within a transfer leaves work on the learner's GPU, until its thread
    has noticed and aborted it: for so long, LIMIT_S at most, a step that waits for the whole GPU
    may stand still. One that dies while it connects costs a thread that waits for ever; if
    the learner's thread fails at that moment, the rollout worker waits for --faults.stall-s.

For several machines the socket becomes one of TCP, the file a TCPStore, and the clock a message.
Tests: tests/test_direct.py
"""
from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from transport.pair import LIMIT_S, RECEIVER, SENDER, Lost, Pair
from transport.versions import TwoVersions, fill

PARCEL_BYTES = 2**28     # at least, unless it is the last: a reader has room for two of them
REQUEST = struct.Struct("<qq")                       # half and number of the parcel
CREDENTIALS = struct.Struct("iII")                   # SO_PEERCRED: process, user, group
TRIES = 3                # of a rollout worker to connect
LINGER_S = 4.0           # for which the learner still serves once it has stopped


@dataclass(frozen=True)
class Parcel:
    """What travels at once: numbers `start` to `end` of a half."""
    start: int
    end: int


class DirectWeights(TwoVersions):
    """The transport. A learner has `halves` [2, size] and a server, a rollout worker a reader."""

    def __init__(self, layout: dict[str, torch.Size], probe: list[int], dtype: torch.dtype,
                 folder: str):
        """`folder`: the run's, in which processes meet."""
        super().__init__(layout, probe, dtype)
        self.folder = folder
        self.address = f"\0asyncopd-{uuid.uuid4().hex}"      # a name in no folder: nothing is left
        self.device = torch.device("cpu")
        self.halves: Tensor | None = None
        self.server: Server | None = None
        self.reader: Reader | None = None
        self.parcels, self.parcel_of = packed(self.starts, self.size, dtype.itemsize)

    def __getstate__(self) -> dict:
        """What another process gets: nothing that this one has for itself."""
        return vars(self) | {"halves": None, "server": None, "reader": None}

    def attach(self, device: str) -> None:
        self.device = torch.device(device)

    # -- the learner

    def write(self, half: int, parameters: Mapping[str, Tensor],
              gather: Callable[[Tensor], Tensor]) -> Tensor:
        if self.halves is None:
            self.halves = torch.zeros(2, self.size, dtype=self.dtype, device=self.device)
        views = {name: self.cut(name, self.halves[half]) for name in self.layout}
        sums = fill(views, parameters, gather)
        if self.server is None:
            self.server = Server(self.address, self.folder, self.halves, self.parcels)
        return sums

    def close(self) -> None:
        if self.server is not None:
            self.server.close()
            self.server = None

    # -- a rollout worker

    def tensors(self, half: int) -> Mapping[str, Tensor]:
        if self.reader is None:
            self.reader = Reader(self.address, self.parcels, self.dtype, self.device)
        return Arriving(self, half)


def packed(starts: Mapping[str, int], size: int,
           itemsize: int) -> tuple[list[Parcel], dict[str, int]]:
    """Whole tensors in parcels, and by name the number of a tensor's parcel."""
    parcels = []
    parcel_of = {}
    names = list(starts)
    ends = [*list(starts.values())[1:], size]
    first = 0
    for name, end in zip(names, ends):
        parcel_of[name] = len(parcels)
        if (end - first) * itemsize >= PARCEL_BYTES or end == size:
            parcels.append(Parcel(first, end))
            first = end
    return parcels, parcel_of


class Arriving(Mapping[str, Tensor]):
    """The tensors of a version, by name, each fetched when it is looked up, along with those of its
    parcel. Only the newest parcel is kept, so they are best looked up in their order."""

    def __init__(self, weights: DirectWeights, half: int):
        self.weights = weights
        self.half = half
        self.number = -1                             # of the parcel that is here
        self.here: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        weights = self.weights
        number = weights.parcel_of[name]
        if number != self.number:
            self.here = None                         # gives its memory back before the next comes
            self.here = weights.reader.fetch(self.half, number)
            self.number = number
        return weights.cut(name, self.here, weights.parcels[number].start)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights.layout)

    def __len__(self) -> int:
        return len(self.weights.layout)


# -- the learner's end ----------------------------------------------------------------------------

class Server:
    """Threads of the learner that send what rollout workers ask for."""

    def __init__(self, address: str, folder: str, halves: Tensor, parcels: list[Parcel]):
        self.folder = folder
        self.halves = halves
        self.parcels = parcels
        self.served: list[threading.Thread] = []
        # Each message arrives whole, and the end of the other process as an empty one
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.bind(address)
        self.socket.listen(64)
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        """A thread for every rollout worker of this user."""
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:                          # closed
                return
            if user_of(connection) != os.getuid():
                connection.close()
                continue
            thread = threading.Thread(target=self.serve, args=(connection,), daemon=True)
            self.served.append(thread)
            thread.start()

    def serve(self, connection: socket.socket) -> None:
        """Until the rollout worker hangs up. Whatever becomes of it concerns no other."""
        meeting = Path(self.folder) / f".weights-{uuid.uuid4().hex}"
        pair = None
        if self.halves.is_cuda:          # on its stream nothing waits for the training, or it for us
            torch.cuda.set_device(self.halves.device)
            torch.cuda.set_stream(torch.cuda.Stream())
        try:
            with connection:
                connection.send(str(meeting).encode())
                pair = Pair(SENDER, str(meeting), self.halves.device)
                while request := connection.recv(REQUEST.size):
                    half, number = REQUEST.unpack(request)
                    parcel = self.parcels[number]
                    pair.send(self.halves[half, parcel.start:parcel.end],
                              alive=lambda: not hung_up(connection))
        except (Lost, OSError):
            if pair is not None:
                pair.give_up()
        finally:
            meeting.unlink(missing_ok=True)

    def close(self) -> None:
        """Serve those that are connected until they hang up, but for LINGER_S at most."""
        self.socket.shutdown(socket.SHUT_RDWR)       # wakes `accept`
        self.socket.close()
        end = time.monotonic() + LINGER_S
        for thread in self.served:
            thread.join(max(0.0, end - time.monotonic()))


def user_of(connection: socket.socket) -> int:
    """The user whose process is at the other end, as the kernel knows it."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    return CREDENTIALS.unpack(found)[1]


def hung_up(connection: socket.socket) -> bool:
    """Whether the other end is closed. Between a request and its answer nobody sends anything."""
    readable, _, _ = select.select([connection], [], [], 0)
    return bool(readable)


# -- a rollout worker's end -----------------------------------------------------------------------

class Reader:
    """Fetches parcels; connects when that is needed."""

    def __init__(self, address: str, parcels: list[Parcel], dtype: torch.dtype,
                 device: torch.device):
        self.address = address
        self.parcels = parcels
        self.dtype = dtype
        self.device = device
        self.connection: socket.socket | None = None
        self.pair: Pair | None = None
        self.connections = 0                         # made so far

    def fetch(self, half: int, number: int) -> Tensor:
        """One parcel of a half. Raises ConnectionError."""
        why = ""
        for _ in range(TRIES):
            try:
                if self.pair is None:
                    self.connect()
                return self.receive(half, self.parcels[number], number)
            except (Lost, OSError) as e:
                why = str(e)
                self.hang_up()
        raise ConnectionError(f"the learner does not send its weights: {why}")

    def connect(self) -> None:
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.settimeout(LIMIT_S)
        self.connection.connect(self.address)
        meeting = self.connection.recv(4096).decode()
        if not meeting:
            raise Lost("it has hung up")
        self.connections += 1
        self.pair = Pair(RECEIVER, meeting, self.device)

    def receive(self, half: int, parcel: Parcel, number: int) -> Tensor:
        x = torch.empty(parcel.end - parcel.start, dtype=self.dtype, device=self.device)
        work = self.pair.begin_to_receive(x)         # first, so that the learner's GPU never waits
        self.connection.send(REQUEST.pack(half, number))
        self.pair.finish(work, alive=lambda: not hung_up(self.connection))
        return x

    def hang_up(self) -> None:
        if self.pair is not None:
            self.pair.give_up()
        if self.connection is not None:
            self.connection.close()
        self.pair = None
        self.connection = None
