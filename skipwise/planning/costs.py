"""What training costs: FLOPs, memory and time, from the sizes of a model. No torch."""

from dataclasses import dataclass
from typing import Literal

from skipwise.errors import UserError
from skipwise.models.shape import ModelShape

# Bytes of a number.
FLOAT32, BFLOAT16 = 4, 2
# A weight in 4 bits with its share of the scales, which are rounded themselves (QLoRA, arXiv 2305.14314, Section 3).
FOUR_BITS = 0.5 + 0.127 / 8
# Tokens whose logits exist at a time (`models/forward.py`).
LOGIT_ROWS = 512
# On a CPU the heap grows by more than what is kept, since temporary tensors leave holes between those that stay, and
# libraries claim buffers when they are first used. Both fitted to what was measured (docs/performance.md).
CPU_HEAP, CPU_BUFFERS = 1.5, 40e6
ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Step:
    """One training step of one device.

    Attributes:
        window: tokens of a window.
        windows: at a time.
        accumulation: how often that is repeated; gradients then add up while activations are there.
        checkpointing: whether activations of a layer are computed again in the backward pass; `selective`: all but
            those of matmuls and attention.
        teacher: whether an untouched copy of the model reads every window, too.
        adapter_rank: of low-rank adapters, which alone are trained; 0 for all weights.
        embeddings_trained: the input embedding beside adapters (and norms, which are few).
        four_bits: whether the weights of layers are kept in 4 bits.
    """

    window: int
    windows: int = 1
    accumulation: int = 1
    checkpointing: bool | Literal["selective"] = False
    teacher: bool = False
    adapter_rank: int = 0
    embeddings_trained: bool = False
    four_bits: bool = False


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a step, in floating-point additions and multiplications.

    Attributes:
        products: of weight matrices.
        attention: of queries with keys, and of their shares with values.
    """

    matmuls: float
    attention: float

    @property
    def total(self) -> float:
        """Both."""
        return self.matmuls + self.attention


def step_flops(shape: ModelShape, step: Step) -> StepFlops:
    """FLOPs of a step of one device.

    A pass over a token multiplies and adds once per weight of a matrix (Kaplan et al., arXiv 2001.08361, Section 2.1),
    and twice per layer, query dimension and token seen; a causal token sees half of its window. The backward pass is
    two such passes, checkpointing (of all, not selective) and a teacher are one each. Weights that are not trained have
    no gradient, which is half of the backward pass of their products; products of adapters are not counted.
    """
    passes = 3 + (step.checkpointing is True) + step.teacher
    tokens = step.window * step.windows * step.accumulation
    matmuls = 2.0 * shape.product_weights * tokens * (passes - bool(step.adapter_rank))
    attention = 4.0 * shape.layers * shape.query_size * (step.window / 2) * tokens * passes
    return StepFlops(matmuls, attention)


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one device at the height of a training step, by part.

    Attributes:
        weights: in float32, or those of layers in 4 bits.
        copies: of the matrices in bfloat16, as autocast makes them in every step.
        optimizer: both moments of Adam, in float32.
        teacher: the untouched model in bfloat16, whole on every device.
        gradients: in float32; they grow as activations go.
        activations: kept for the backward pass.
        logits: of `LOGIT_ROWS` tokens, and the gradient of the output embedding.
        buffers: of libraries.
        accumulated: whether gradients of earlier windows are there beside activations.
    """

    weights: float
    copies: float
    optimizer: float
    teacher: float
    gradients: float
    activations: float
    logits: float
    buffers: float
    accumulated: bool = False

    @property
    def peak(self) -> float:
        """Without accumulation gradients are there when activations are gone."""
        lasting = self.weights + self.copies + self.optimizer + self.teacher + self.buffers
        forward = self.activations + self.logits
        return lasting + (forward + self.gradients if self.accumulated else max(forward, self.gradients))


def step_memory(shape: ModelShape, step: Step, devices: int = 1, zero: int = 0, cpu: bool = False) -> StepMemory:
    """Bytes of one device at the height of a training step with float32 weights under bfloat16 autocast.

    Attention keeps queries, keys, values and its result, and never its scores. Sharding divides among devices: the
    optimizer at ZeRO stage 1, gradients too at 2, weights too at 3 (Rajbhandari et al., arXiv 1910.02054, Figure 1).

    Args:
        shape: of the model.
        step: what one device does.
        devices: that share the work.
        zero: stage, 0 to 3.
        cpu: whether the device is one; what an accelerator's allocator holds beyond what is in use was not measured.
    """
    if zero not in ZERO_STAGES or devices < 1:
        raise UserError(
            f"ZeRO has stages 0 to 3 on at least one device, not {zero} on {devices}. Set --zero 3.",
            code="zero_out_of_range",
        )
    parameters = shape.parameters
    of_weights, of_gradients, of_optimizer = (devices if zero >= stage else 1 for stage in (3, 2, 1))
    matrices = shape.layers * shape.layer_weights
    adapters = adapter_weights(shape, step.adapter_rank)
    weights = FLOAT32 * (parameters - matrices + adapters) + (FOUR_BITS if step.four_bits else FLOAT32) * matrices
    trained = parameters
    if step.adapter_rank:
        trained = adapters + (shape.embedding_weights if step.embeddings_trained else 0)
    # Stage 3 gathers one layer at a time; 4 bits are unpacked for a matrix at a time, which is less.
    copied = shape.layer_weights + shape.embedding_weights
    copies = BFLOAT16 * (copied if zero == 3 or step.four_bits else shape.product_weights)
    tokens = step.window * step.windows
    layer = activation_bytes(shape)
    kept = kept_bytes(shape, matmuls=step.checkpointing == "selective")
    activations = tokens * (shape.layers * kept + layer if step.checkpointing else shape.layers * layer)
    rows = min(LOGIT_ROWS, tokens)
    logits = rows * shape.vocabulary * (2 * BFLOAT16 + 2 * FLOAT32) * (2 if step.teacher else 1)
    return StepMemory(
        weights=weights / of_weights,
        copies=copies,
        optimizer=2 * FLOAT32 * trained / of_optimizer,
        teacher=float(BFLOAT16 * parameters) if step.teacher else 0.0,
        gradients=FLOAT32 * trained / of_gradients,
        activations=activations * (CPU_HEAP if cpu else 1.0),
        logits=logits + (BFLOAT16 if step.adapter_rank else FLOAT32 + BFLOAT16) * shape.embedding_weights,
        buffers=CPU_BUFFERS if cpu else 0.0,
        accumulated=step.accumulation > 1,
    )


def adapter_weights(shape: ModelShape, rank: int) -> int:
    """Weights of the two factors beside every matrix of every layer: `rank` times what goes in and what comes out."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    attention = 4 * hidden + 2 * shape.query_size + 2 * shape.key_size
    return rank * shape.layers * (attention + (3 if shape.gated else 2) * (hidden + inner))


def kept_bytes(shape: ModelShape, matmuls: bool) -> int:
    """Bytes that one layer keeps of one token under checkpointing: what goes in, in float32, and results of products.

    Those are in bfloat16: queries, keys, values, attention and its projection, a feed-forward network's inside (twice
    with a gate) and its result.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    results = 2 * shape.query_size + 2 * shape.key_size + 2 * hidden + inner * (2 if shape.gated else 1)
    return FLOAT32 * hidden + (BFLOAT16 * results if matmuls else 0)


def activation_bytes(shape: ModelShape) -> int:
    """Bytes that one layer keeps of one token for its backward pass.

    Each of the two norms keeps what it gets and what it scales, in float32; each matrix its input, in bfloat16 (those
    that share an input have a copy each); attention keeps queries, keys and values; a gate keeps both factors and what
    goes into its activation function.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    norms = 2 * 2 * FLOAT32 * hidden
    inputs = BFLOAT16 * hidden * (5 if shape.gated else 4)
    attention = BFLOAT16 * (2 * shape.query_size + 2 * shape.key_size)
    feed_forward = BFLOAT16 * inner * (4 if shape.gated else 2)
    return norms + inputs + attention + feed_forward
