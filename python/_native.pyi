"""The binding of csrc/ (python/module.cpp). Invalid arguments raise ValueError before anything is read."""

from collections.abc import Sequence

from epo_kernels.declaration import KLType, LossAggMode, Penalty, RowPolicyLoss

# `NATIVE_NAMES` of epo_kernels/declaration.py when the module was built.
declared_names: dict[str, tuple[str, ...]]

class Array:
    """A strided array in the memory of `owner`, checked to be inside the `capacity` bytes that start at `storage`.

    Strides count elements. The owner is kept alive as long as the array or anything created from it.
    """

    def __init__(
        self,
        pointer: int,
        dtype: str,
        shape: Sequence[int],
        strides: Sequence[int],
        storage: int,
        capacity: int,
        owner: object,
    ) -> None: ...

class Rows:
    """`epo_kernels.fused.rows.Rows`; the temperature is a number or (B, T)."""

    def __init__(
        self,
        logits: Array,
        tokens: Array,
        mask: Array,
        temperature: float | Array,
        vocab_size: int,
        scale: float | None,
        softcap: float | None,
    ) -> None: ...

class Terms:
    """`epo_kernels.fused.rows.Terms`, for the tokens of `rows`."""

    def __init__(
        self,
        rows: Rows,
        weights: Array,
        advantages: Array,
        old_log_probs: Array | None,
        ref_log_probs: Array | None,
        is_weights: Array | None,
        lower: Array | None,
        upper: Array | None,
        coefficients: Array,
        policy_loss: RowPolicyLoss,
        penalty: Penalty,
        kl_type: KLType,
    ) -> None: ...

def cpu_instructions() -> list[str]:
    """Instruction sets supported by this build and processor, best first: "avx512", "avx2", "plain"."""

def cpu_statistics(
    rows: Rows,
    log_probs: Array,
    entropy: Array | None,
    maximum: Array,
    sum: Array,
    threads: int,
    instructions: str | None = None,
) -> None:
    """Writes the statistics of the rows. instructions: None uses the best."""

def cpu_spread(
    rows: Rows,
    entropy: Array,
    maximum: Array,
    sum: Array,
    variance: Array,
    collision: Array,
    threads: int,
    instructions: str | None = None,
) -> None:
    """Writes Σ p (log p + H)² and Σ p² of the rows, from their statistics."""

def cpu_gradient(
    rows: Rows,
    log_probs: Array,
    entropy: Array | None,
    maximum: Array,
    sum: Array,
    grad_log_probs: Array,
    grad_entropy: Array | None,
    out: Array,
    threads: int,
    instructions: str | None = None,
) -> None:
    """Writes the gradient of the logits for given upstream gradients to out."""

def cpu_loss(
    rows: Rows,
    terms: Terms,
    out: Array | None,
    log_probs: Array,
    entropy: Array,
    sums: Array,
    threads: int,
    instructions: str | None = None,
) -> None:
    """Writes the loss's sums, its log-probs and entropies, and its gradient to out."""

def cpu_scale(values: Array, factor: float, threads: int, instructions: str | None = None) -> None:
    """values *= factor in float32; values are contiguous."""

# If CUDA kernels were built, cuda_missing is None and the functions below exist; otherwise it gives the reason. Calls
# launch on the given stream (an address) of the device (its ordinal), without a sync; CUDA errors raise RuntimeError.
cuda_missing: str | None
cuda_archs: str

def cuda_unsupported(device: int) -> str | None:
    """None if there is machine code for the device, otherwise CUDA's error message."""

def cuda_workspace_size(device: int) -> int:
    """Length of the float64 workspace of `cuda_loss`."""

def cuda_statistics(
    rows: Rows,
    log_probs: Array,
    entropy: Array | None,
    maximum: Array,
    sum: Array,
    device: int,
    stream: int,
) -> None: ...
def cuda_spread(
    rows: Rows,
    entropy: Array,
    maximum: Array,
    sum: Array,
    variance: Array,
    collision: Array,
    device: int,
    stream: int,
) -> None: ...
def cuda_gradient(
    rows: Rows,
    log_probs: Array,
    entropy: Array | None,
    maximum: Array,
    sum: Array,
    grad_log_probs: Array,
    grad_entropy: Array | None,
    out: Array,
    device: int,
    stream: int,
) -> None: ...
def cuda_loss(
    rows: Rows,
    terms: Terms,
    out: Array | None,
    log_probs: Array,
    entropy: Array,
    sums: Array,
    loss: Array,
    workspace: Array,
    ticket: Array,
    device: int,
    stream: int,
    family: str = "chosen",
) -> str:
    """Returns the family of kernels that ran, "ring" or "sweeps".

    family: "chosen", or "ring" or "sweeps" to force one; a ring that cannot run raises RuntimeError.
    """

def cuda_prepare(
    mask: Array,
    lengths: Array,
    sequence_ids: Array | None,
    loss_agg_mode: LossAggMode,
    normalizer: float | Array | None,
    loss_scale: float | Array,
    max_length: float,
    coefficients: Sequence[float | Array],
    weights: Array,
    coefficients_out: Array,
    ticket: Array,
    extras: Array,
    device: int,
    stream: int,
) -> None:
    """Token weights and coefficients."""

def cuda_scale(values: Array, factor: Array, device: int, stream: int) -> None:
    """values *= factor in float32; does not touch values if the factor is 1."""
