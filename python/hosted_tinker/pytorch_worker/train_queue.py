"""Training work in order: one FIFO an adapter. A micro-batch is a run of datums of one request."""

import collections
import dataclasses
from collections.abc import Callable

from hosted_tinker.pytorch_worker.errors import WorkerError


@dataclasses.dataclass
class Item:
    """A request: an op (no lengths), or a batch with the tokens of each datum."""

    id: int
    adapter: str
    run: Callable | None = None
    lengths: tuple[int, ...] = ()
    next_datum: int = 0

    @property
    def is_batch(self) -> bool:
        return bool(self.lengths)

    @property
    def started(self) -> bool:
        return self.next_datum > 0


@dataclasses.dataclass
class Slice:
    item: Item
    begin: int
    end: int


@dataclasses.dataclass
class Plan:
    """What the compute thread does next: an op, or a micro-batch of slices."""

    op: Item | None = None
    number: int = 0
    slices: tuple[Slice, ...] = ()


class TrainQueue:
    def __init__(self, micro_batch_tokens: int, one_by_one: bool):
        """`one_by_one`: a datum's logprobs depend on the padded length, so that none may share a micro-batch."""
        self._tokens = micro_batch_tokens
        self._one_by_one = one_by_one
        self._fifos: dict[str, collections.deque[Item]] = {}  # no empty ones; adapters take turns in this order
        self._replay: collections.deque = collections.deque()  # the protocol's MicroBatch
        self.next_number = 1
        self.draining = False

    def __len__(self) -> int:
        return sum(len(fifo) for fifo in self._fifos.values())

    def push(self, item: Item) -> None:
        self._fifos.setdefault(item.adapter, collections.deque()).append(item)

    def set_replay(self, micro_batches) -> None:
        """Compose exactly these before composing freely; their requests may still have to come."""
        for micro_batch in micro_batches:
            self.next_number = max(self.next_number, micro_batch.number + 1)
            self._replay.append(micro_batch)

    def clear_replay(self) -> None:
        self._replay.clear()

    def fail(self, item: Item) -> None:
        """Takes a request out with what is left of it, and out of the replay."""
        fifo = self._fifos.get(item.adapter, ())
        if item in fifo:
            fifo.remove(item)
            self._tidy(item.adapter)
        kept = collections.deque()
        for micro_batch in self._replay:
            slices = [s for s in micro_batch.slices if s.request != item.id]
            if slices:
                del micro_batch.slices[:]
                micro_batch.slices.extend(slices)
                kept.append(micro_batch)
        self._replay = kept

    def drained(self) -> bool:
        """No request is partly executed."""
        return not self._replay and not any(fifo[0].started for fifo in self._fifos.values())

    def ready(self) -> bool:
        """Throws WorkerError when the replay does not fit the requests that came."""
        return self._next_op() is not None or self._next_batch() is not None

    def next(self) -> Plan | None:
        """A plan counts as executed as soon as it is handed out."""
        if (op := self._next_op()) is not None:
            self._take_turn(op.adapter)
            self._fifos[op.adapter].popleft()
            self._tidy(op.adapter)
            return Plan(op=op)
        if (found := self._next_batch()) is None:
            return None
        number, slices = found
        if self._replay:
            self._replay.popleft()
        self.next_number = max(self.next_number, number + 1)
        for part in slices:
            self._take_turn(part.item.adapter)
            part.item.next_datum = part.end
            if part.end == len(part.item.lengths):
                self._fifos[part.item.adapter].remove(part.item)
                self._tidy(part.item.adapter)
        return Plan(number=number, slices=slices)

    def _take_turn(self, adapter: str) -> None:
        self._fifos[adapter] = self._fifos.pop(adapter)

    def _tidy(self, adapter: str) -> None:
        if not self._fifos[adapter]:
            del self._fifos[adapter]

    def _next_op(self) -> Item | None:
        return next((fifo[0] for fifo in self._fifos.values() if not fifo[0].is_batch), None)

    def _end_of(self, item: Item) -> int:
        """As many datums as fit, padded to the longest of them; one at least."""
        end = item.next_datum + 1
        longest = item.lengths[item.next_datum]
        while end < len(item.lengths) and not self._one_by_one:
            longest = max(longest, item.lengths[end])
            if longest * (end + 1 - item.next_datum) > self._tokens:
                break
            end += 1
        return end

    def _next_batch(self) -> tuple[int, tuple[Slice, ...]] | None:
        if self._replay:
            return self._replayed()
        heads = [fifo[0] for fifo in self._fifos.values() if fifo[0].is_batch]
        if self.draining:
            # What is partly executed comes to its end first; meanwhile what fits into one micro-batch goes on.
            whole = [head for head in heads if not head.started and self._end_of(head) == len(head.lengths)]
            heads = whole + [head for head in heads if head.started]
        return (self.next_number, (Slice(heads[0], heads[0].next_datum, self._end_of(heads[0])),)) if heads else None

    def _replayed(self) -> tuple[int, tuple[Slice, ...]] | None:
        """The next recorded micro-batch once each of its slices is next in its adapter's queue."""
        record, slices = self._replay[0], []
        reached: dict[str, list] = {}  # adapter → [index in its queue, next datum]
        for part in record.slices:
            found = next((item for fifo in self._fifos.values() for item in fifo if item.id == part.request), None)
            if found is None:
                return None
            fifo = self._fifos[found.adapter]
            at = reached.setdefault(found.adapter, [0, fifo[0].next_datum])
            if fifo[at[0]].is_batch and at[1] == len(fifo[at[0]].lengths) and at[0] + 1 < len(fifo):
                at[:] = [at[0] + 1, 0]
            if fifo[at[0]] is not found:
                return None
            if part.datum_begin != at[1] or not at[1] < part.datum_end <= len(found.lengths):
                raise WorkerError(
                    f"the replay wants datums {part.datum_begin} to {part.datum_end} of request {found.id}, which has "
                    f"{len(found.lengths)} and has come to datum {at[1]}"
                )
            at[1] = part.datum_end
            slices.append(Slice(found, part.datum_begin, part.datum_end))
        return record.number, tuple(slices)
