"""What the scheduler tells the workers each step, and what they tell it. Kept small: it crosses processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from swiftcache.engine.loans import LendJob


@dataclass(frozen=True, slots=True)
class Adapter:
    """The LoRA adapter that blocks are computed with: vLLM's number, and a digest of its files, empty where that is not
    known. Then none of its blocks are kept."""

    number: int
    files: bytes


@dataclass(slots=True)
class LoadJob:
    request: str
    first: int
    """Which unit of the request is the first (see `groups`). With several groups the blocks of a request fail
    together."""
    keys: bytes
    """None of a claimed one: the claim knows which blocks it is of."""
    blocks: list[int]
    sync: bool
    """Whether this step's forward needs it, and hears how it ended."""
    adapter: Adapter | None = None
    claimed: bool = False
    """Its blocks are claimed (`claims`): this step's forward needs it, and it cannot fail."""
    computes: bool = False
    """Of a claimed one: whether this step computes several tokens of the request."""


@dataclass(slots=True)
class StoreJob:
    number: int
    request: str
    keys: bytes
    blocks: list[int]
    adapter: Adapter | None = None


@dataclass
class StepMetadata(KVConnectorMetadata):
    loads: list[LoadJob] = field(default_factory=list)
    stores: list[StoreJob] = field(default_factory=list)
    fence: list[int] = field(default_factory=list)
    """Stores whose blocks were given away: they must be over before anything writes to the pool."""
    lend: list[LendJob] = field(default_factory=list)
    take_back: list[int] = field(default_factory=list)
    """Loans."""
    staged: int = 0
    """Blocks of all contexts of this step if a part of them is in leased slabs, else 0."""
    idle: bool = False
    """Every request is over, and so are its stores: nothing of theirs comes after this step."""
    doubt: int = 0
    """A number for a step whose forward relies on loads that may fail, this connector's or another one's. The workers
    report it with the step's outcome. 0: nothing that the step computes is in doubt."""
    weights: dict[tuple[int, int], int] = field(default_factory=dict)
    """How many updates of its weights the scheduler knows of, of each worker that has had any. If there are more, the
    loads and stores of this step are of other weights."""
    arrived: dict[str, bool] = field(default_factory=dict)
    """Requests whose loads all workers have said are over, told once, and whether this step computes several tokens of
    them (`landing`)."""

    def orders_nothing(self) -> bool:
        """Whether the workers have nothing to do once it has begun, as in most steps that decode."""
        orders = self.loads or self.stores or self.lend or self.take_back or self.staged or self.idle or self.doubt
        return not orders


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    done: dict[int, int] = field(default_factory=dict)
    """Stores that are over, by how many workers."""
    lost: set[int] = field(default_factory=set)
    """Those of them of which some worker kept less than everything."""
    failed: dict[str, int] = field(default_factory=dict)
    """Requests with a failed load, and their first unit that is not there."""
    back: dict[int, int] = field(default_factory=dict)
    """Loans that nobody else can touch any more, in how many workers."""
    lend_refused: str = ""
    """Why this worker can lend nothing at all."""
    met: dict[tuple[int, int], Handshake] = field(default_factory=dict)
    """Workers that say who they are, by their ranks in pipeline and tensor parallelism."""
    settled: int = 0
    """The step's `doubt`: blocks that its loads lost are in the same output of vLLM's workers."""
    weights: dict[tuple[int, int], int] = field(default_factory=dict)
    """How many updates of its weights each worker has had, of those that had one since their last report."""
    unsettled: bool = False
    """Every request is over, and some stores are not counted yet."""

    def is_empty(self) -> bool:
        happened = (
            self.done or self.failed or self.back or self.lend_refused or self.met or self.settled or self.weights
        )
        return not (happened or self.unsettled)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, WorkerReport)
        for number, workers in other.done.items():
            self.done[number] = self.done.get(number, 0) + workers
        self.lost |= other.lost
        for request, block in other.failed.items():
            self.failed[request] = min(block, self.failed.get(request, block))
        for loan, workers in other.back.items():
            self.back[loan] = self.back.get(loan, 0) + workers
        self.lend_refused = self.lend_refused or other.lend_refused
        self.met |= other.met
        self.weights |= other.weights
        self.settled = max(self.settled, other.settled)
        self.unsettled = self.unsettled or other.unsettled
        return self


@dataclass
class Handshake(KVConnectorHandshakeMetadata):
    """Who a worker is. The scheduler looks up what all workers can load."""

    namespace: str
    borrower_id: bytes
    """Names the worker's cache, whose own blocks and devices the broker knows."""
    local_blocks: int | None = None
    """The first blocks of a stitched pool, of which every byte is local; None where all of the pool is."""
