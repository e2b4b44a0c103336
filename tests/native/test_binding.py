"""The boundary of the native module: bad input is refused with an error, and never reaches a kernel."""

import pytest
import torch

from epo_kernels.backends.native import array, native, native_rows
from epo_kernels.declaration import COEFFICIENTS, ROW_SUMS
from epo_kernels.fused.rows import Rows
from epo_kernels.inputs import LogitTransform

_native = native()


def an_array(pointer=4096, dtype="float32", shape=(2, 3), strides=(3, 1), storage=4096, capacity=24):
    return _native.Array(pointer, dtype, shape, strides, storage, capacity, None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"pointer": 0}, "null"),
        ({"pointer": 4098, "capacity": 100}, "aligned to 4 bytes for float32"),
        ({"pointer": 4097, "dtype": "bfloat16", "capacity": 100}, "aligned to 2 bytes"),
        ({"shape": (-1, 3)}, "sizes must not be negative"),
        ({"strides": (3, -1)}, "strides must not be negative"),
        ({"strides": (3,)}, "must be as many as sizes"),
        ({"capacity": 23}, "past the end of the storage of 23 bytes"),
        ({"capacity": -24}, "storage's size must not be negative"),
        ({"storage": 4100}, "past the end"),
        ({"strides": (4, 1)}, "past the end"),
        ({"shape": (2, 2**62)}, "past any memory"),
        ({"shape": (2**40, 2**40), "strides": (2**40, 1)}, "past any memory"),
        ({"dtype": "complex64"}, "dtype must be"),
    ],
)
def test_memory_that_is_not_there_is_refused(arguments, says):
    an_array()
    with pytest.raises(ValueError, match=says):
        an_array(**arguments)


def test_an_empty_array_needs_no_memory():
    an_array(pointer=0, shape=(0, 3), storage=0, capacity=0)


@pytest.fixture
def given():
    """Rows of 2 by 3 tokens over 5 logits, and the tensors that they view."""
    tensors = {
        "logits": torch.randn(2, 3, 5),
        "tokens": torch.zeros(2, 3, dtype=torch.int64),
        "mask": torch.ones(2, 3, dtype=torch.bool),
        "temperature": torch.ones(2, 3),
    }
    return tensors


def make_rows(tensors, vocab_size=5, scale=None, softcap=None):
    return _native.Rows(*(array(tensor) for tensor in tensors.values()), vocab_size, scale, softcap)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"logits": torch.zeros(2, 3, 0)}, "vocabulary of 1 or more"),
        ({"logits": torch.zeros(2, 15)}, "three sizes"),
        ({"logits": torch.zeros(2, 3, 5, dtype=torch.float64)}, "float32, float16 or bfloat16, got float64"),
        ({"tokens": torch.zeros(2, 3, dtype=torch.int32)}, "tokens must be int64, got int32"),
        ({"tokens": torch.zeros(2, 4, dtype=torch.int64)}, r"tokens must have sizes \(2, 3\), got \(2, 4\)"),
        ({"mask": torch.ones(2, 3)}, "mask must be bool"),
        ({"temperature": torch.ones(())}, "temperature must have sizes"),
    ],
)
def test_rows_that_do_not_fit_are_refused(given, changes, says):
    make_rows(given)
    with pytest.raises(ValueError, match=says):
        make_rows({**given, **changes})


@pytest.mark.parametrize(
    ("numbers", "says"),
    [({"vocab_size": 0}, "vocab_size"), ({"vocab_size": 6}, r"in \[1, 5\], got 6"), ({"softcap": 0.0}, "softcap")],
)
def test_numbers_out_of_range_are_refused(given, numbers, says):
    with pytest.raises(ValueError, match=says):
        make_rows(given, **numbers)


def test_results_that_do_not_fit_are_refused(given):
    rows = make_rows(given)
    fine = [array(torch.empty(2, 3)) for _ in range(4)]
    _native.cpu_statistics(rows, *fine, 1)
    for wrong in (torch.empty(3, 2), torch.empty(3, 2).t(), torch.empty(2, 3, dtype=torch.float64)):
        with pytest.raises(ValueError, match="log_probs must"):
            _native.cpu_statistics(rows, array(wrong), *fine[1:], 1)
    known = [array(torch.ones(2, 3)) for _ in range(3)]
    _native.cpu_spread(rows, *known, *fine[:2], 1)
    with pytest.raises(ValueError, match="collision must"):
        _native.cpu_spread(rows, *known, fine[0], array(torch.empty(3, 2)), 1)
    with pytest.raises(ValueError, match="threads must be 1 or more"):
        _native.cpu_statistics(rows, *fine, 0)
    with pytest.raises(ValueError, match="instructions must be one of"):
        _native.cpu_statistics(rows, *fine, 1, "mmx")


def test_gradients_that_overlap_their_logits_are_refused(given):
    rows = make_rows(given)
    log_probs, entropy, maximum, total, upstream = (array(torch.ones(2, 3)) for _ in range(5))

    def gradient(out, grad_entropy=upstream, entropy=entropy):
        _native.cpu_gradient(rows, log_probs, entropy, maximum, total, upstream, grad_entropy, array(out), 1)

    gradient(torch.empty(2, 3, 5))
    memory = torch.zeros(40)
    given["logits"] = memory[:30].view(2, 3, 5)
    rows = make_rows(given)
    gradient(given["logits"])
    with pytest.raises(ValueError, match="share no memory"):
        gradient(memory[10:].view(2, 3, 5))
    with pytest.raises(ValueError, match="a place of its own"):
        gradient(torch.empty(2, 3, 1).expand(2, 3, 5))
    with pytest.raises(ValueError, match="out must be float32"):
        gradient(torch.empty(2, 3, 5, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="entropy must be given"):
        gradient(torch.empty(2, 3, 5), entropy=None)


def test_terms_of_other_rows_are_refused(given):
    rows = make_rows(given)
    floats = array(torch.ones(2, 3))

    def make_terms(rows, floats=floats, missing=0, penalty="none", upper=None):
        numbers = array(torch.ones(len(COEFFICIENTS) - missing))
        return _native.Terms(rows, floats, floats, None, None, None, floats, upper, numbers, "ppo", penalty, "k3")

    terms = make_terms(rows, upper=floats)
    with pytest.raises(ValueError, match="given together"):
        make_terms(rows)
    with pytest.raises(ValueError, match=rf"coefficients must have sizes \({len(COEFFICIENTS)},\)"):
        make_terms(rows, missing=1, upper=floats)
    with pytest.raises(ValueError, match="penalty must be one of none, hinge"):
        make_terms(rows, penalty="fine", upper=floats)
    few = {name: tensor[:1] for name, tensor in given.items()}
    results = array(torch.empty(1, 3)), array(torch.empty(1, 3))
    with pytest.raises(ValueError, match=r"terms must be of \(1, 3\) tokens"):
        _native.cpu_loss(make_rows(few), terms, None, *results, array(torch.empty(len(ROW_SUMS)).double()), 1)


def test_views_of_tensors_know_their_storage(given):
    whole = given["logits"]
    rows = Rows(whole[1:, :2, 1:4], given["tokens"][1:, :2], given["mask"][1:, :2], LogitTransform(3, 1.0, None, None))
    native_rows(rows)
    beyond = torch.as_strided(whole, (2, 3, 5), (15, 5, 1))
    whole.untyped_storage().resize_(4 * 29)
    with pytest.raises(ValueError, match="past the end"):
        array(beyond)
