"""The client of SwiftCache, in Rust. Every method that waits does so without the GIL, and one that waits for nothing keeps
it: to get it back beside a thread that computes takes up to Python's switch interval.

Wrong arguments raise `ValueError` naming the argument. A bug of this module raises `RuntimeError`. Nothing else
raises: an absent, dying or restarted broker, a revoked lease and a failed copy are all misses.

Logs go to standard error; `RUST_LOG` chooses them (default: warn).

Beyond what was agreed with the connector, and compatible with it:
* `Cache.load(..., after=mark)`: copies into the pool start only after that point of the engine's stream. On a GPU an
  engine that schedules ahead still runs kernels that write to blocks it has already given away.
* `Cache.problem()` and `Connection.problem()`: why it is not open or connected, for people.
* `Connection.wait_connected` returns False at once when the broker refuses this process for good.
"""

from collections.abc import Sequence
from typing import final

__version__: str
DEFAULT_LOOKUP_MS: int
"""How long a cache's lookup waits for the broker unless it is told otherwise, milliseconds."""
MAX_DRAIN_MS: int
"""The longest time that the protocol takes for a drain, and the longest of a setting in milliseconds."""
MAX_TENANT_BYTES: int
"""The longest name of a tenant."""

@final
class Connection:
    """This process's session with the node's broker.

    Starts at once, connects in the background, and again after every loss, for ever. Create it after the process has
    forked, not before: its thread does not follow.
    """

    def __init__(self, socket: str, *, name: str, tenant: str = "") -> None:
        """
        Args:
            socket: the broker's Unix socket.
            name: for people, in status and logs; 1 to 128 bytes.
            tenant: sub-division of this user's tenant; at most 64 bytes. Blocks are shared within a tenant only.
        """

    def is_connected(self) -> bool:
        """Whether the broker is there now."""

    def wait_connected(self, seconds: float) -> bool:
        """Waits until the broker is there, `seconds` at most. Whether it is."""

    def problem(self) -> str:
        """What the last attempt to connect met; empty while connected."""

    def count_hits(
        self,
        namespaces: Sequence[str],
        hashes: bytes,
        *,
        deadline_ms: int,
        borrowers: Sequence[bytes] | None = None,
    ) -> int:
        """The longest run of leading blocks that every rank can load: a scheduler's lookup.

        Holds nothing in place: a block can be gone by the time it is loaded.

        Args:
            namespaces: one for each rank (tensor, pipeline) whose part of a block must be there; at least one.
            hashes: 16 bytes for each block, in prefix order. Those after the first 65,536 count as absent.
            deadline_ms: the longest to wait, milliseconds.
            borrowers: the `borrower_id` of each rank's cache, in the order of `namespaces`. A rank is then found exactly
                what its cache can load: what its device reaches, and its own host memory. Nothing while that cache is not
                open. Without them a rank is found whatever is published in its namespace, wherever that lies.

        Returns:
            Blocks; 0 when the broker is absent, late or in trouble.
        """

    def watch_index(self, namespaces: Sequence[str]) -> IndexWatch:
        """Follows what the broker's index has of these namespaces of this connection's tenant: one for each rank."""

    def count(
        self,
        namespaces: Sequence[str],
        hashes: bytes,
        *,
        deadline_ms: int,
        borrowers: Sequence[bytes] | None = None,
    ) -> tuple[int, int, int]:
        """Like `count_hits`, and what would be found besides if it were asked again soon.

        Returns:
            Blocks that every rank can load now; blocks right behind that are on their way from a disk into host memory;
            how long that may take, milliseconds, 0 when nobody knows.
        """

    def close(self) -> None:
        """Ends the session, once the caches opened with it are closed too. From now on everything is a miss."""

@final
class Cache:
    """A worker's cache in leased HBM, and host memory.

    Opens in the background as soon as the broker is there. Until then loads find nothing and stores keep nothing.
    Any thread may call.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        namespace: str,
        layer_bytes: Sequence[int],
        max_leased_bytes: int,
        max_host_leased_bytes: int | None = None,
        lease_step_bytes: int | None = None,
        host_tier_bytes: int | None = None,
        device: str | None = None,
        backend: str = "auto",
        share: bool | None = None,
        lookup_ms: int | None = None,
        lend_drain_ms: int | None = None,
        borrower_id: bytes | None = None,
    ) -> None:
        """
        Args:
            namespace: what makes two blocks interchangeable: model, precision, layout, rank; 1 to 256 bytes.
            layer_bytes: bytes of one block in each layer. An engine that keeps K and V apart lists each layer twice.
            max_leased_bytes: the most HBM to lease from donors, bytes; 0: nothing.
            max_host_leased_bytes: the most host memory to lease from donors where they lend too little HBM, bytes; None:
                none.
            lease_step_bytes: how much to lease at a time, bytes; None: an eighth of `max_leased_bytes`.
            host_tier_bytes: host memory for blocks that donors have no room for, bytes, taken when it opens; None: none.
            device: UUID of the device that the engine computes on; None: the backend's first.
            backend: "cuda", "host" (shared memory; the devices are what the broker says), or "auto": what fits the
                broker's devices.
            share: also load blocks that other processes published in this namespace; None: yes.
            lookup_ms: how long the broker may take to find those, and how long their memory may take to be mapped, the
                first time; past it they are not loaded. None: `DEFAULT_LOOKUP_MS`.
            lend_drain_ms: how long borrowers may take to move blocks away from what the engine lends and asks back; 0 or
                None: the broker's default.
            borrower_id: 16 bytes that name the cache to `Connection.count_hits`, drawn at random by the engine. A cache
                that takes the place of a closed one may have its id; no two open ones may. None: drawn here.
        """

    def register_pool(
        self,
        layers: Sequence[tuple[int, int, int, int]],
        blocks: int,
        owner: object,
        *,
        stream_pool: StreamPool | None = None,
    ) -> None:
        """Says where the engine's KV pool is; a later call replaces it for copies that start later.

        Before the cache is open the pool is remembered, and adopted when it opens; what is wrong with its addresses
        then shows in `problem`.

        Args:
            layers: for each entry of `layer_bytes`: address of the memory, its bytes, offset of block 0 in it, bytes
                from one block to the next.
            blocks: blocks in the pool.
            owner: kept alive as long as copies may touch the memory: until the cache is closed (or the pool
                replaced) and every copy is over.
            stream_pool: the stitched pool that all the memories lie in, if they do. Loads and stores then wait at their
                beginning for units that move, and no unit moves before their copies are known to be over. Close the cache
                first. Nothing of such a pool can be lent.
        """

    def is_open(self) -> bool:
        """Whether it has opened and can find and keep blocks. Stays true when the broker goes away."""

    def wait_open(self, seconds: float) -> bool:
        """Waits until it is open, `seconds` at most. Whether it is."""

    def problem(self) -> str:
        """Why it is not open, or has no pool to copy to; empty when nothing is wrong."""

    def load(
        self, hashes: bytes, blocks: Sequence[int], after: Mark | None = None
    ) -> Load:
        """Looks blocks up and queues their copies into the pool, layer by layer; waits for one lookup at most.

        The pool's blocks belong to the copies until the load is finished.

        Args:
            hashes: 16 bytes for each block, in prefix order.
            blocks: where each goes: block numbers of the pool, one for each hash.
            after: copies start after this point of the engine's stream; None: at once.
        """

    def lookup(self, hashes: bytes, *, ask: bool = True) -> Hit:
        """Finds the first blocks that can be loaded, and holds them in place: for an engine whose scheduler and worker are one
        process. Waits for one lookup at most. Nothing while the cache is not open.

        Args:
            hashes: 16 bytes for each block, in prefix order.
            ask: also find what other processes published, which takes a question to the broker. Without it nothing is
                waited for.
        """

    def claim(self, hashes: bytes, most_bytes: int) -> Claim | None:
        """Finds the first blocks that lie in this cache's own leases of HBM, and keeps their memory from being given back until they
        are loaded: for an engine whose scheduler and worker are one process, and whose forward is to rely on the load before it
        begins. Asks nobody and waits for nothing. None if there are none, if they have more than `most_bytes`, and while the
        cache is not open. Blocks in memory that goes with its donor (legacy handles), in host memory and behind PCIe are not
        claimed, nor are those behind them.

        Args:
            hashes: 16 bytes for each block, in prefix order.
            most_bytes: more than this is not claimed.
        """

    def mark(self, stream: int) -> Mark:
        """Marks the present end of an engine's stream. While the stream is captured into a CUDA graph its work does not
        run, so there is nothing to mark: nothing is stored from such a mark. The capture goes on.

        Args:
            stream: a `CUstream` of the device's primary context, 0: the default stream. It must outlive the cache.
                Without meaning on the host backend, where what an engine has computed is there.
        """

    def store(
        self, hashes: bytes, blocks: Sequence[int], marks: Sequence[Mark] = ()
    ) -> Store:
        """Queues write-back of a sequence's consecutive blocks. Blocks that are kept already are skipped, and so is
        the rest of the sequence when room runs out.

        The pool's blocks must stay as they are until the store is done.

        Args:
            hashes: 16 bytes for each block, in prefix order.
            blocks: where each lies: block numbers of the pool, one for each hash.
            marks: for each layer, the point of the engine's stream at which it is computed; empty: all are.
        """

    def lend(
        self, loan: int, ranges: Sequence[tuple[int, int]], after: Mark | None = None
    ) -> None:
        """Lends ranges of the registered pool to other processes until they have come back; returns at once.

        From this call until `returned_loans` names the loan the engine neither reads nor writes them. They are zeroed
        before anybody else sees them, and again when they come back. Without a broker the loan waits for one.

        Args:
            loan: a number that no other loan has.
            ranges: address and bytes of each; nothing of it is lent already. Of each as much as can be exported is lent,
                as one slab: 64 KiB at least.
            after: the engine's work that may still touch them ends at this point of its stream; None: it is over.
        """

    def take_back(self, loans: Sequence[int]) -> None:
        """Asks for loans back; returns at once. Borrowers have `lend_drain_ms` to move away and let go."""

    def returned_loans(self) -> list[int]:
        """Loans that have come back since the last call, asked back or not: nobody else can touch them any more.

        A loan that could not be lent comes back at once, and `lend_problem` says why. One that is out when the broker
        loses its records never comes back.
        """

    def lend_problem(self) -> str:
        """Why the last loan that could not be lent was not."""

    def stats(self) -> dict[str, float]:
        """What it has done since it opened, and what it holds now; all zero before.

        Counts: lookups, revocations, refused_leases, broker_misses, failed_operations, drain_count, acknowledge_count.
        Blocks: lookup_blocks, hit_{donor,shared,host}_blocks, failed_blocks, late_blocks, stored_blocks,
        known_blocks, duplicate_blocks, unplaced_blocks, evicted_blocks, demoted_blocks, promoted_blocks, moved_to_donor_blocks,
        moved_to_host_blocks, dropped_blocks.
        Bytes: {loaded,stored}_{same_device,nvlink,pcie,host}_bytes.
        Microseconds: {drain,acknowledge}_{p50,p99,max}_us.
        Now: routes_down, leases, shared_leases, leased_bytes, host_leased_bytes, donor_blocks, host_blocks, unsettled_slabs
        (0: everything that was stored is counted), connected (0 or 1), open (0 or 1).
        """

    def close(self) -> None:
        """Takes back what is lent, for as long as healthy borrowers need; waits for copies, gives every lease back, and lets
        go of the pool. Loads and stores still held end here."""

@final
class IndexWatch:
    """Which blocks every rank can find in donors' memory: the broker's index, followed in the background.

    It tells of the blocks that it was named only. What it tells of a block: its 16 bytes, whether it is in host memory (else in
    HBM), and whether it can be found there; if not, its last copy is gone. Where ranks have a block in different kinds of memory
    it counts as in the slowest. While the broker is away nothing is told.
    """

    def name(self, hashes: bytes) -> None:
        """From now on it tells of these blocks: at once where they can be found already."""

    def forget(self, hashes: bytes) -> list[tuple[bytes, bool, bool]]:
        """It tells of these no more. Returns what it has told of them and would not take back, as gone."""

    def take(self) -> list[tuple[bytes, bool, bool]]:
        """What has become of them since the last call, in the order in which it did. Waits for nothing."""

    def close(self) -> None:
        """Follows nothing any more."""

@final
class Hit:
    """What a lookup found: `len` says how many blocks, the first ones of its hashes.

    Own blocks stay where they are as long as it lives, unless their donor takes them back; those of other processes for a
    bounded time. So keep it for the time between a lookup and its load, not longer: what it holds makes no room for others.
    """

    def __len__(self) -> int: ...
    @property
    def own_blocks(self) -> int:
        """How many of the first blocks are this cache's own. A load of these, once started with nothing `missing`, fails only if
        a copy does."""

    @property
    def coming(self) -> tuple[int, int]:
        """Blocks right behind those found that are on their way from a disk into host memory: a lookup that is asked again soon
        finds them. And how long that may take, milliseconds, 0 when nobody knows."""

    def load(self, blocks: Sequence[int], after: Mark | None = None) -> Load:
        """Queues the copies of its first blocks into the pool, layer by layer, and returns at once.

        The pool's blocks belong to the copies until the load is finished.

        Args:
            blocks: where each goes: block numbers of the pool, at most `len` of the hit.
            after: copies start after this point of the engine's stream; None: at once.
        """

@final
class Claim:
    """Blocks whose memory is not given back before they are loaded: `len` says how many. Donors wait for it, so drop it as soon as
    it is not needed."""

    def __len__(self) -> int: ...
    def load(self, blocks: Sequence[int], after: Mark | None = None) -> Load:
        """As `Hit.load`, once: a second load has nothing. The load is promised (`Load.promise`), unless the device fails.
        Another thread queues its copies: whoever asks the load for more than `is_done` waits until that has happened."""

@final
class Load:
    """Blocks on their way into the pool. Positions are indexes into the hashes that were asked for.

    Dropping it leaves its copies running.
    """

    def missing(self) -> list[int]:
        """The positions known to have failed by now, ascending, without waiting: right after the start, blocks that had been
        given up since they were found."""

    def promise(self, most_bytes: int) -> bool:
        """Whether others may rely on the load from here on, though its last `most_bytes` bytes may still be on their way:
        whoever reads a layer waits for it first (`gate_layer`). Then `finish` names failed positions only if the device
        fails. False of others' blocks, where blocks are missing, of memory that goes with its donor (legacy handles),
        over PCIe, and while more bytes are on their way."""

    def wait_layer(self, layer: int) -> list[int]:
        """Waits until a layer is in the pool. Returns the positions known to have failed so far, ascending: their
        blocks must be computed."""

    def gate_layer(self, layer: int, stream: int) -> None:
        """Makes an engine's stream wait, on the device, until a layer is in the pool. On the host backend the caller
        waits. Which positions failed is known from `finish` only. While the stream is captured into a CUDA graph the
        caller waits, too; launches of that graph wait for nothing.

        Args:
            stream: as in `Cache.mark`.
        """

    def is_done(self) -> bool:
        """Whether every copy is over."""

    def finish(self) -> list[int]:
        """Waits for every layer. Returns the failed positions, ascending: their blocks must be computed, whatever was
        read from them since. The last word; the same at every call."""

@final
class Loans:
    """What an engine lends of its own pool, as its scheduler keeps it: a loan is back when it is on every worker.

    The engine gives `Cache.lend` the numbers of these loans on each worker, and `came_back` what `Cache.returned_loans`
    says there. It has no clock: `now` is the time in seconds since whatever beginning the caller chose.
    """

    def __init__(self, *, workers: int, drain_ms: int) -> None:
        """
        Args:
            workers: how many have a part of each loan.
            drain_ms: how long borrowers may take to move away from what is asked back.
        """

    @property
    def patience(self) -> float:
        """How long giving back may take, seconds: `drain_ms`, and a margin for copies under way."""

    def lend(self) -> int:
        """A new loan. Returns its number, which no other has had."""

    def ask_back(self, loans: Sequence[int], now: float) -> list[int]:
        """Asks for loans back, and for those of which a part came back unasked. Returns those that the workers are to ask
        back: each once."""

    def came_back(self, parts: dict[int, int], now: float) -> list[tuple[int, float | None]]:
        """So many more workers have their part of a loan back. Returns the loans that are over with that, and how long
        each took since it was asked back, seconds; None for one that came back unasked."""

    def out(self) -> tuple[list[int], list[int]]:
        """Loans that have not been asked back, and those that have and are not over."""

    def is_awaited(self, now: float) -> bool:
        """Whether anything is on its way back, and has been for no longer than `patience`."""

@final
class Mark:
    """A point on an engine's stream.

    One taken before the cache was open marks nothing: a store that needs it keeps nothing, a load after it finds
    nothing.
    """

@final
class Store:
    """Blocks on their way out of the pool. Dropping it leaves copying and publishing to the background."""

    def is_done(self) -> bool:
        """Whether the pool's blocks have been read and may change."""

    def unplaced(self) -> int:
        """Blocks for which there was no room, no open cache or no pool. Known from the beginning."""

    def finish(self) -> dict[str, int]:
        """Waits until what is kept can be found by others. The same at every call.

        Returns:
            Blocks by outcome: `stored`; `known`: kept already; `unplaced`: no room, no open cache or no pool; `lost`:
            revoked, failed, or a replica was first.
        """

@final
class StreamPool:
    """A KV cache whose tensors begin in local HBM and end in leased slabs: a context longer than local HBM has room for.

    One range of addresses for each worker process. A tensor of it has local bytes, and units behind them:
    `[ local | unit | unit | ... ]`. A unit is as large as donors' slabs and keeps its address. Its bytes are at one *home*: a
    leased slab, a spare slab of local HBM, or the host floor, which has a place for every unit. When a slab is asked back, its
    unit moves between two steps of the engine: to another slab, a spare one, or the floor. When there is room again, units on
    the floor move back.

    Any thread may call. Besides what is said at each method, every method raises `RuntimeError` once the pool is lost: a unit is
    mapped nowhere and cannot be mapped again, or the broker lost its records, and units' bytes may be another's. An engine must
    stop then, rather than answer wrongly.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        namespace: str,
        stream_bytes: int,
        unit_bytes: int | None = None,
        spare_units: int | None = None,
        device: str | None = None,
        backend: str = "auto",
        step_ms: float = 10.0,
        patience_s: float = 30.0,
    ) -> None:
        """Waits for the broker, leases slabs, and takes as much host memory: until all is leased, or the broker has nothing more
        to lend. Fewer slabs than asked for are no error, none are.

        Args:
            connection: one of the pool's own. Slabs that cannot be units are not granted to it again. The pool keeps its session.
            namespace: names the leases in quotas and status; 1 to 256 bytes. Not that of the cache.
            stream_bytes: the most to lease, bytes; whole units of it are used.
            unit_bytes: the size of a unit, bytes: the donors' `--slab`. None: that of the first slab that can be had.
            spare_units: slabs of local HBM to keep for units whose slabs are asked back; None: none.
            device, backend: as for `Cache`.
            step_ms: what moving units may cost one step, milliseconds. One unit is moved in any case.
            patience_s: how long to wait for the broker and for slabs, seconds.

        Raises:
            ValueError: names the argument.
            RuntimeError: the broker is not there, nothing can be leased, the driver cannot stitch, or there is no room for the
                host floor or the spare units. Nothing is held then.
        """

    @property
    def unit_bytes(self) -> int:
        """The size of a unit, bytes."""

    @property
    def units(self) -> int:
        """How many units can be laid out: as many as slabs were leased when it was opened."""

    @property
    def granularity(self) -> int:
        """Local parts are multiples of this, bytes."""

    @property
    def device(self) -> str:
        """UUID of the device that computes in it."""

    def lay_out(
        self, tensors: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int, int]]:
        """Lays tensors out, once: takes the local memory, reserves the addresses and maps every unit. All bytes are zero. Slabs
        that no unit needs are given back.

        By this call the engine promises, until it has called `close`: it touches the tensors only between `begin_step` and
        `end_step`, but for work that it has queued in between; such work is over, or is waited for by the stream that
        `end_step` is told. A `Cache` whose pool lies in them is told so (`register_pool`).

        Args:
            tensors: size of each, bytes, and how many units lie at its end. At least one granule stays local.

        Returns:
            For each: its address, its size, and how many of its bytes are local for ever: size less units, rounded up to the
            granularity. What is behind those is in units.

        Raises:
            ValueError: sizes do not fit, there are more units than slabs, or it is laid out already.
            RuntimeError: no room for the local parts.
        """

    def begin_step(self) -> int:
        """Begins a step: no unit moves before `end_step`. Steps nest and overlap, and none moves while they do. If units are to be moved, and no step is begun,
        waits for what earlier steps have queued, and moves units now, for at most `step_ms`, or one.

        Returns:
            How many units have moved.

        Raises:
            RuntimeError: the pool is lost or closed. No step has begun then.
        """

    def end_step(self, stream: int) -> None:
        """Ends a step. No unit moves before what was queued on the stream is over. Call it when a capture into a CUDA graph is
        over: what a captured stream has to do cannot be marked, and then nothing moves before the next step's end.

        Args:
            stream: as in `Cache.mark`.

        Raises:
            RuntimeError: no step was begun.
        """

    def homes(self) -> bytes:
        """Where each unit is, in the order in which they were laid out: 0 in a leased slab, 1 in a spare one, 2 on the host
        floor. Units move outside steps only."""

    def generation(self) -> int:
        """Grows whenever units have moved."""

    def stats(self) -> dict[str, float]:
        """Where units are now, and what has become of them since it was opened.

        Units now: units, in_slabs, in_spares, on_floor, to_vacate (their slabs are asked back), and by the way to them
        {same_device,nvlink,pcie,host}_units. Slabs: free_slabs. Bytes: unit_bytes, leased_bytes, floor_bytes. connected (0 or 1).
        Counts: moved_units, failed_moves, revocations, refused_leases, {step,drain,acknowledge}_count.
        Microseconds: {step,drain,acknowledge}_{p50,p99,max}_us: of the batches of moves, and of slabs from when they are asked
        back until no unit is in them, and until the broker knows.
        """

    def close(self) -> None:
        """Unmaps everything and gives the leases back. The engine touches the tensors no more, and its work in them is over, or
        is waited for: for ten seconds at most, then in the background. Close the cache first."""
