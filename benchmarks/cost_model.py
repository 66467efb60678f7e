"""Predict what a training step costs on many GPUs: operations, bytes sent and held, and the time that they take.

Operations and bytes are counts: `tests/benchmarks/test_cost_model.py` holds them to what torch counts in real steps.
Times are predictions from them and from `Hardware`, most of which is assumed. `docs/scaling.md` shows both.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """Describe a decoder with gated MLPs and RMS norms (Llama, Qwen2); teacher and student have this shape."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    qkv_bias: bool

    @property
    def keys(self) -> int:
        """Return the width of a layer's keys, and of its values; that of its queries is the hidden size."""
        return self.hidden * self.kv_heads // self.heads

    @property
    def layer_matrices(self) -> int:
        return self.hidden * (2 * self.hidden + 2 * self.keys + 3 * self.intermediate)

    @property
    def layer(self) -> int:
        """Count a layer's parameters: its matrices, two norms, and the biases of queries, keys and values."""
        return self.layer_matrices + 2 * self.hidden + self.qkv_bias * (self.hidden + 2 * self.keys)

    @property
    def head(self) -> int:
        return self.vocab * self.hidden

    @property
    def around(self) -> int:
        """Count the parameters outside the layers and the head: embeddings (not tied to it) and the last norm."""
        return self.head + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer + self.around + self.head


@dataclass(frozen=True)
class Work:
    """Count what one rank does in a step, in tokens; a pair is a query and a key that attention computes."""

    teacher_tokens: int
    student_tokens: int
    rows: int  # student rows, each compared with a teacher row of its own
    teacher_pairs: int
    student_pairs: int


def documents(count: int, tokens: int = 400, suffixes: int = 5, suffix_tokens: int = 25) -> Work:
    """Count the work of documents of one length, without padding.

    Their suffixes do not overlap, and the last one ends the document. No model reads a suffix's last token. Pairs are
    all that lie in one document or suffix, masked or not.
    """
    teacher, student = tokens - 1, suffix_tokens - 1
    rows = count * suffixes * student
    return Work(count * teacher, rows, rows, count * teacher**2, count * suffixes * student**2)


def operations(model: Model, work: Work) -> dict[str, int]:
    """Count the floating-point operations of a rank's step, by part; a multiplication and an addition are two.

    The fused loss takes 4 products of rows x vocabulary x hidden size: both models' logits, and two for the gradient.
    """
    matrices, width = model.layers * model.layer_matrices, model.layers * model.hidden
    return {
        "teacher, forward": 2 * matrices * work.teacher_tokens + 4 * width * work.teacher_pairs,
        "student, forward and backward": 6 * matrices * work.student_tokens + 12 * width * work.student_pairs,
        "loss": 4 * 2 * work.rows * model.vocab * model.hidden,
    }


@dataclass(frozen=True)
class Plan:
    """Say how a step is divided: documents over all ranks, both models' weights and states over `shard` of them.

    `shard` 1 is DDP, with a whole teacher on every rank; otherwise FSDP2 holds both models, a group a layer and one for
    the rest, and copies of them are data parallel (HSDP) where there are more ranks. With `vocab` above 1 heads are
    divided over so many neighbouring ranks instead (`vocab_group`), which gather the hidden states of all their rows.
    """

    ranks: int
    shard: int = 1
    vocab: int = 1
    compute_bytes: int = 2  # that a parameter or hidden state has as models compute with it
    reduce_bytes: int = 4  # that an entry of a gradient has as ranks exchange it


@dataclass(frozen=True)
class Collective:
    """Describe all collective calls of one kind that a step makes for one purpose."""

    kind: str  # "all_gather", "reduce_scatter" or "all_reduce"
    purpose: str
    payload: int  # bytes on one rank: of what was gathered, of what is scattered, of what is reduced
    calls: int
    ranks: int  # how many take part
    stride: int  # from one of these ranks to the next; 1: neighbours

    @property
    def passes(self) -> int:
        """Count how often all bytes go round a ring of ranks: an all-reduce is a reduce-scatter and an all-gather."""
        return 2 if self.kind == "all_reduce" else 1

    @property
    def sent(self) -> float:
        """Return the bytes that leave a rank, in a ring."""
        return self.passes * (self.ranks - 1) / self.ranks * self.payload


def collectives(model: Model, work: Work, plan: Plan) -> list[Collective]:
    """List what the ranks send each other in a step, but for a few numbers that are logged."""
    found = _parameters_and_gradients(model, plan) + (_divided_heads(model, work, plan) if plan.vocab > 1 else [])
    return [collective for collective in found if collective.ranks > 1]


BUCKET = 25 * 2**20  # bytes: DDP's gradients travel in pieces of this size


def _parameters_and_gradients(model: Model, plan: Plan) -> list[Collective]:
    """List the collectives of parameters and gradients that are not divided by vocabulary."""
    body, rest = model.layers * model.layer, model.around + (model.head if plan.vocab == 1 else 0)
    gradients = plan.reduce_bytes * (body + rest)
    if plan.shard == 1:
        return [Collective("all_reduce", "gradients", gradients, -(-gradients // BUCKET), plan.ranks, 1)]
    copies, groups = plan.ranks // plan.shard, model.layers + 1
    return [
        # A layer's are gathered again in the backward, the rest's are kept.
        Collective(
            "all_gather", "student", plan.compute_bytes * (2 * body + rest), 2 * model.layers + 1, plan.shard, 1
        ),
        Collective("all_gather", "teacher", plan.compute_bytes * (body + rest), groups, plan.shard, 1),
        Collective("reduce_scatter", "gradients", gradients, groups, plan.shard, 1),
        Collective("all_reduce", "gradients of copies", gradients // plan.shard, groups, copies, plan.shard),
    ]


CHUNK = 2048  # rows


def _divided_heads(model: Model, work: Work, plan: Plan) -> list[Collective]:
    rows, number = plan.vocab * work.rows, 4
    chunks, copies = -(-rows // CHUNK), plan.ranks // plan.vocab
    hidden = plan.compute_bytes * 2 * model.hidden + number  # of both models, and the row's weight
    gradient = plan.reduce_bytes * model.head // plan.vocab
    return [
        Collective("all_gather", "hidden states", hidden * rows, 3, plan.vocab, 1),
        Collective("all_gather", "statistics of shards", 4 * number * rows * plan.vocab, chunks, plan.vocab, 1),
        Collective(
            "all_reduce", "divergence, hidden gradient", number * (1 + model.hidden) * rows, chunks + 1, plan.vocab, 1
        ),
        Collective("all_reduce", "heads' gradients", gradient, 1, copies, plan.vocab),
    ]


def held_bytes(model: Model, plan: Plan) -> int:
    """Count a rank's bytes: weights, gradients and AdamW states (16 a parameter), teacher, what is gathered at once.

    Activations come on top: they depend on the batch, and on checkpointing.
    """
    heads = 0 if plan.vocab == 1 else model.head
    whole = model.parameters - heads
    own, heads_own = 16 + plan.compute_bytes, (16 + 2 * plan.compute_bytes) * heads // plan.vocab
    if plan.shard == 1:  # autocast keeps a copy of the weights it has rounded
        return (own + plan.compute_bytes) * whole + heads_own
    # The student's embeddings and head stay for the step; a layer is used while the next is on its way.
    rest = model.around + model.head - heads
    return own * whole // plan.shard + heads_own + plan.compute_bytes * (rest + 2 * model.layer)


@dataclass(frozen=True)
class Hardware:
    """Hold the bytes and operations a second of one GPU of a cluster, and of its links in one direction."""

    peak: float = 790e12  # bf16 products on one H200, measured elsewhere
    memory: float = 4.3e12  # measured elsewhere
    efficiency: float = 0.6  # share of the peak that a step's products reach: assumed
    nvlink: float = 300e9  # assumed: two thirds of the 450 GB/s in the data sheet
    network: float = 40e9  # assumed: four fifths of a 400 Gbit/s adapter a GPU
    hop: float = 5e-6  # s, from one rank of a ring to the next, however little is sent: assumed
    node: int = 8  # GPUs
    capacity: float = 139 * 2**30  # bytes

    def seconds(self, collective: Collective) -> float:
        if collective.stride >= self.node:
            bandwidth = self.network
        elif collective.stride * collective.ranks <= self.node:
            bandwidth = self.nvlink
        else:  # a ring through nodes, whose adapters share what leaves it
            bandwidth = min(self.nvlink, self.node * self.network)
        hops = collective.passes * (collective.ranks - 1)
        return collective.sent / bandwidth + collective.calls * hops * self.hop


@dataclass(frozen=True)
class Prediction:
    products: float  # s
    optimizer: float
    communication: float

    @property
    def overlapped(self) -> float:
        """Return the seconds of a step in which communication hides behind products, or products behind it."""
        return max(self.products, self.communication) + self.optimizer

    @property
    def in_turn(self) -> float:
        return self.products + self.communication + self.optimizer


ADAMW_BYTES = 28  # a parameter: weight, gradient and two states are read, all but the gradient are written


def predict(model: Model, work: Work, plan: Plan, hardware: Hardware) -> Prediction:
    heads = 0 if plan.vocab == 1 else model.head
    own = (model.parameters - heads) / plan.shard + heads / plan.vocab
    return Prediction(
        products=sum(operations(model, work).values()) / (hardware.peak * hardware.efficiency),
        optimizer=ADAMW_BYTES * own / hardware.memory,
        communication=sum(hardware.seconds(collective) for collective in collectives(model, work, plan)),
    )


MODELS = {
    "7B": Model("Qwen2.5-7B", 3584, 18944, 28, 28, 4, 152064, qkv_bias=True),
    "70B": Model("Llama-3.1-70B", 8192, 28672, 80, 64, 8, 128256, qkv_bias=False),
}
