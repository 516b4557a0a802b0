"Soft targets: the mixture, the ramp, no gradient; and the mutants of the known pitfalls."

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracles import caught, loop_soft_targets
from torch.testing import assert_close

from speechimg.distillation import alpha_ramp, soft_targets
from speechimg.sic import sic_loss, similarity_logits

# ---- the ramp ----


def check_ramp(ramp):
    assert ramp(0, 1000, 0.4) == 0
    assert abs(ramp(250, 1000, 0.4) - 0.1) < 1e-12 and abs(ramp(999, 1000, 0.4) - 0.3996) < 1e-12
    assert ramp(1000, 1000, 0.4) == ramp(10**9, 1000, 0.4) == 0.4
    assert ramp(0, 0, 0.4) == ramp(5, 0, 0.4) == 0.4
    assert ramp(7, 10, 0.0) == 0


def one_early(step, ramp_steps, alpha):
    return alpha * min(1, (step + 1) / max(1, ramp_steps))


def never_ends(step, ramp_steps, alpha):
    return alpha * step / max(1, ramp_steps)


def twice_as_long(step, ramp_steps, alpha):
    return alpha * min(1, step / (2 * ramp_steps)) if ramp_steps else alpha


def at_once(step, ramp_steps, alpha):
    return alpha


def test_ramp():
    check_ramp(alpha_ramp)
    for mutant in (one_early, never_ends, twice_as_long, at_once):
        caught(check_ramp, mutant)


@given(step=st.integers(0, 10_000), ramp_steps=st.integers(0, 5000), alpha=st.floats(0, 1))
def test_ramp_is_monotonic_and_bounded(step, ramp_steps, alpha):
    assert (
        0 <= alpha_ramp(step, ramp_steps, alpha) <= alpha_ramp(step + 1, ramp_steps, alpha) <= alpha
    )


@pytest.mark.parametrize(
    "arguments", [(-1, 10, 0.4), (1, -10, 0.4), (1, 10, 1.1), (1, 10, -0.1), (1, 10, math.nan)]
)
def test_impossible_ramps_are_refused(arguments):
    with pytest.raises(ValueError, match="alpha_ramp"):
        alpha_ramp(*arguments)


# ---- the targets ----


def check_targets(soft):
    generator = torch.Generator().manual_seed(0)
    hand = soft(torch.tensor([[0.0, 3.0, 2.0]]), torch.tensor([[1.0, 0, 0]]), 0.4)
    assert_close(hand, torch.tensor([[0.6140, 0.2820, 0.1040]]), atol=1e-3, rtol=0)
    for alpha in (0.0, 0.4, 1.0):
        logits, targets = (
            9 * torch.randn(5, 12, generator=generator),
            torch.rand(5, 12, generator=generator).softmax(1),
        )
        q = soft(logits, targets, alpha)
        assert_close(q.double(), loop_soft_targets(logits, targets, alpha), atol=1e-6, rtol=1e-5)
        assert_close(q.sum(1), torch.ones(5))


def weights_exchanged(logits, targets, alpha):
    return (1 - alpha) * logits.softmax(1) + alpha * targets


def logits_averaged(logits, targets, alpha):
    return (alpha * logits + (1 - alpha) * targets).softmax(1)


def softmax_over_queries(logits, targets, alpha):
    return alpha * logits.softmax(0) + (1 - alpha) * targets


def not_normalised(logits, targets, alpha):
    return alpha * logits.softmax(1) + targets


def test_targets_equal_the_loops():
    check_targets(soft_targets)
    for mutant in (weights_exchanged, logits_averaged, softmax_over_queries, not_normalised):
        caught(check_targets, mutant)


@given(alpha=st.floats(0, 1), seed=st.integers(0, 99), n=st.integers(1, 6), m=st.integers(1, 9))
def test_rows_sum_to_one(alpha, seed, n, m):
    generator = torch.Generator().manual_seed(seed)
    q = soft_targets(
        20 * torch.randn(n, m, generator=generator),
        torch.rand(n, m, generator=generator).softmax(1),
        alpha,
    )
    assert_close(q.sum(1), torch.ones(n))
    assert (q >= 0).all()


def with_gradient(logits, targets, alpha):
    return alpha * logits.float().softmax(1) + (1 - alpha) * targets.float()


def check_no_gradient(soft):
    logits, targets = torch.randn(3, 4, requires_grad=True), torch.eye(3, 4).requires_grad_()
    for alpha in (0.0, 0.4):
        assert not soft(logits, targets, alpha).requires_grad


def test_pitfall_34_no_gradient_into_the_targets():
    check_no_gradient(soft_targets)
    caught(check_no_gradient, with_gradient)


def check_temperature_gradient(soft):
    "Student and teacher share tau, which feels the student's logits only: -sum(dL/dz z)/tau."
    generator = torch.Generator().manual_seed(0)
    s, i, slow_s, slow_i = (
        F.normalize(torch.randn(4, 6, generator=generator), dim=1) for _ in range(4)
    )
    tau, y = torch.nn.Parameter(torch.tensor(0.2)), torch.eye(4)
    q = (
        soft(similarity_logits(slow_s, slow_i, tau), y, 0.4),
        soft(similarity_logits(slow_i, slow_s, tau), y, 0.4),
    )
    losses = [
        -(target * z.log_softmax(1)).sum(1).mean() / 2
        for target, z in zip(
            q, (similarity_logits(s, slow_i, tau), similarity_logits(i, slow_s, tau))
        )
    ]
    (gradient,) = torch.autograd.grad(sum(losses), tau)
    expected = 0.0
    for target, (queries, keys) in zip(q, ((s, slow_i), (i, slow_s))):
        z = (queries.double() @ keys.double().T) / 0.2
        expected -= float(((z.softmax(1) - target.detach().double()) / 8 * z).sum()) / 0.2
    assert abs(float(gradient) - expected) < 1e-4, (float(gradient), expected)


def test_tau_learns_through_the_student_only():
    check_temperature_gradient(soft_targets)
    caught(check_temperature_gradient, with_gradient)


def test_pitfall_19_float32_whatever_comes_in():
    logits, targets = torch.tensor([[4.3, 3.0, -2.0]]), torch.tensor([[1.0, 0, 0]])

    def check(soft):
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            with torch.autocast("cpu", torch.bfloat16):
                q = soft(logits.to(dtype), targets.to(dtype), 0.9)
            assert q.dtype == torch.float32
            assert_close(
                q.double(), loop_soft_targets(logits.to(dtype), targets, 0.9), atol=1e-7, rtol=1e-4
            )

    check(soft_targets)
    caught(check, lambda z, y, a: (a * z.half().softmax(1) + (1 - a) * y.half()).float())


def check_off(soft):
    "Without distillation not even a broken teacher gets through."
    y = torch.eye(2, 5)
    assert torch.equal(soft(torch.full((2, 5), torch.nan), y, 0.0), y)


def test_alpha_zero_is_off():
    check_off(soft_targets)
    caught(check_off, with_gradient)


def test_off_equals_plain_contrastive_learning():
    s, i = F.normalize(torch.randn(4, 6), dim=1), F.normalize(torch.randn(4, 6), dim=1)
    y = torch.eye(4)
    q = soft_targets(similarity_logits(s, i, 0.07), y, 0.0)
    assert torch.equal(sic_loss(s, i, s, i, (q, q), 0.07).loss, sic_loss(s, i, s, i, y, 0.07).loss)


def test_a_student_that_agrees_with_its_teacher_feels_only_the_labels():
    "softmax(z) - q, with softmax(z) equal to the teacher's: (1 - alpha)(softmax(z) - y) is left."
    z = torch.randn(3, 5)
    q = soft_targets(z, torch.eye(3, 5), 0.4)
    assert_close(z.softmax(1) - q, 0.6 * (z.softmax(1) - torch.eye(3, 5)))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="soft_targets"):
        soft_targets(torch.zeros(2, 3), torch.zeros(2, 2), 0.4)
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            soft_targets(torch.zeros(2, 2), torch.zeros(2, 2), alpha)
