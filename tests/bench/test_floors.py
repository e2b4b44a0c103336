"""Floors by numbers worked out by hand."""

import pytest

from bench.cases import Case
from bench.floors import Ceilings, Work, ceilings_of, floor_seconds, least_work, triton_bytes
from epo_kernels.backends.triton import Chip

H200 = Chip(processors=132, l2_bytes=60 << 20)


def test_loss_reads_and_writes_every_logit_once():
    # 8192 × 151,936 bf16: 2.489 GB read, 2.489 GB written
    assert least_work(Case("loss", "qwen2.5-3b", 8192, "bf16")) == Work(4_978_638_848, 0)


def test_masked_rows_are_written_but_not_read():
    case = Case("loss", "tiny", 256, "fp32", unmasked=0.25)  # 64 of 256 rows of 1,000 floats
    assert case.counted == 64
    assert least_work(case) == Work(4 * 1000 * (64 + 256), 0)


def test_scores_are_read_alone():
    assert least_work(Case("score", "tiny", 256, "bf16")).bytes == 2 * 1000 * 256


def test_linear_loss_is_three_products():
    work = least_work(Case("linear-loss", "d4096-v131072", 8192, "bf16"))
    assert work.flops == 6 * 8192 * 4096 * 131_072  # 26.4 TFLOP
    assert work.bytes == 2 * (2 * 8192 * 4096 + 2 * 131_072 * 4096)


def test_linear_scores_are_one_product_of_what_counts():
    case = Case("linear-score", "tiny", 256, "fp32", unmasked=0.25)
    assert least_work(case) == Work(4 * (64 * 64 + 1000 * 64), 2 * 64 * 64 * 1000)


def test_floor_is_the_larger_of_both_times():
    ceilings = Ceilings(bytes_per_second=4e12, flops_per_second=800e12)
    assert floor_seconds(Work(4_000_000_000, 0), ceilings) == pytest.approx(1e-3)
    assert floor_seconds(Work(4_000_000_000, 8_000_000_000_000), ceilings) == pytest.approx(10e-3)
    assert floor_seconds(Work(80_000_000_000, 8_000_000_000_000), ceilings) == pytest.approx(20e-3)


def test_floors_of_the_h200_goals():
    ceilings = Ceilings(4.3e12, 780e12)
    loss = floor_seconds(least_work(Case("loss", "qwen2.5-3b", 8192, "bf16")), ceilings)
    assert loss == pytest.approx(1.158e-3, rel=1e-3)
    linear = floor_seconds(least_work(Case("linear-loss", "d4096-v131072", 8192, "bf16")), ceilings)
    assert linear == pytest.approx(33.83e-3, rel=1e-3)


def test_rates_come_from_the_timed_ceilings():
    copy, products = (Work(1000, 0), 0.5), (Work(0, 600), 2.0)
    assert ceilings_of([copy]) == Ceilings(2000.0, None)
    assert ceilings_of([copy, products]) == Ceilings(2000.0, 300.0)


def test_triton_moves_at_least_what_the_floor_counts():
    for case in (
        Case("loss", "llama-2-7b", 8192, "bf16"),
        Case("loss", "qwen2.5-3b", 8192, "bf16", unmasked=0.15),
        Case("score", "qwen2.5-3b", 8192, "bf16"),
    ):
        assert triton_bytes(case, H200) >= least_work(case).bytes
    # Segment scope reads twice and writes once: statistics, then the gradient.
    case = Case("loss", "qwen2.5-3b", 8192, "bf16", band_scope="segment")
    assert triton_bytes(case, H200) == pytest.approx(1.5 * least_work(case).bytes, rel=1e-3)
