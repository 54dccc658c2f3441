"""Losses between features against plain Python, and features at which a formula has a pole."""

import math

import numpy as np
import pytest
import torch
from schoolhouse import functional
from schoolhouse.losses import AttentionTransferLoss, HiddenCosineLoss, HiddenMSELoss, MGDLoss, RKDLoss
from torch import nn

HIDDEN = {"mse": (functional.hidden_mse, HiddenMSELoss), "cosine": (functional.hidden_cosine, HiddenCosineLoss)}


def some(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mean_square(s, t):
    return sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)


def one_minus_cosine(s, t):
    return 1 - sum(a * b for a, b in zip(s, t, strict=True)) / (math.hypot(*s) * math.hypot(*t))


FORMULAS = {"mse": mean_square, "cosine": one_minus_cosine}


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("masked", [False, True])
def test_hidden_losses_are_their_formulas(name, masked):
    student, teacher = some(2, 3, 5), some(2, 3, 5, seed=1)
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]]) if masked else None
    keep = mask.flatten().tolist() if masked else [1] * 6
    rows = zip(student.flatten(0, 1).tolist(), teacher.flatten(0, 1).tolist(), keep, strict=True)
    each = [k * FORMULAS[name](s, t) for s, t, k in rows]
    function, module = HIDDEN[name]
    got = function(student, teacher, mask=mask, reduction="none")
    assert got.shape == (2, 3)
    assert got.flatten().tolist() == pytest.approx(each)
    for reduction, divisor in [("mean", sum(keep)), ("batchmean", 2), ("sum", 1)]:
        want = pytest.approx(sum(each) / divisor)
        assert function(student, teacher, mask=mask, reduction=reduction).item() == want
        assert module(5, 5, reduction)(student, teacher, mask=mask).item() == want
    assert module(5, 5)(student, teacher, mask=None if mask is None else mask.bool()).item() == pytest.approx(
        sum(each) / sum(keep)
    )


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_losses_of_equals_are_zero(name):
    hidden = some(4, 5)
    assert HIDDEN[name][0](hidden, hidden.clone()).item() == pytest.approx(0, abs=1e-12)


def test_cosine_ignores_lengths_and_tells_opposites():
    hidden = some(4, 5)
    assert functional.hidden_cosine(3 * hidden, 0.1 * hidden).item() == pytest.approx(0, abs=1e-12)
    assert functional.hidden_cosine(-hidden, hidden).item() == pytest.approx(2)


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum"])
def test_gradients_of_hidden_losses(name, reduction):
    student, teacher, mask = some(2, 3, 4).requires_grad_(), some(2, 3, 4, seed=1), torch.tensor([[1, 0, 1], [1, 1, 0]])
    function = HIDDEN[name][0]
    assert torch.autograd.gradcheck(lambda s: function(s, teacher, mask=mask, reduction=reduction), (student,))


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("widths", [(4, 4), (4, 6)])
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_tokens_that_do_not_count_may_hold_garbage(name, widths, garbage):
    module = HIDDEN[name][1](*widths).double()
    mask = torch.tensor([[True, False, True], [True, True, False]])
    teacher = some(2, 3, widths[1], seed=1)
    results = []
    for value in (0.5, garbage):
        student = some(2, 3, widths[0]).masked_fill(~mask[..., None], value).requires_grad_()
        loss = module(student, teacher.masked_fill(~mask[..., None], value), mask=mask)
        results.append([loss, *torch.autograd.grad(loss, [student, *module.parameters()])])
        assert not results[-1][1][~mask].any()
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    nothing = module(some(2, 3, widths[0]), teacher, mask=torch.zeros_like(mask))
    assert nothing.item() == 0.0


@pytest.mark.parametrize("name", HIDDEN)
def test_the_projection_is_there_only_if_widths_differ(name):
    function, module = HIDDEN[name]
    assert isinstance(module(4, 4).projection, nn.Identity)
    assert module(4, 4).state_dict() == {}
    made = module(4, 6).double()
    assert list(made.state_dict()) == ["projection.weight"]
    assert made.projection.weight.shape == (6, 4)
    student, teacher = some(2, 3, 4), some(2, 3, 6, seed=1)
    loss = made(student, teacher)
    assert torch.equal(loss, function(student @ made.projection.weight.T, teacher))
    loss.backward()
    assert bool(made.projection.weight.grad.any())


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_hidden_losses_keep_the_dtype_and_large_values(name, dtype):
    student, teacher = (some(3, 64, seed=seed).mul(60).to(dtype) for seed in (0, 1))  # squares beyond float16 in sum
    student.requires_grad_()
    loss = HIDDEN[name][0](student, teacher)
    assert loss.dtype == dtype
    exact = HIDDEN[name][0](student.detach().double(), teacher.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-2, atol=1e-2)
    assert bool(torch.autograd.grad(loss, student)[0].isfinite().all())


def test_cosine_of_a_zero_vector():
    student = torch.zeros(1, 4, requires_grad=True)
    loss = functional.hidden_cosine(student, torch.ones(1, 4))
    assert loss.item() == 1.0
    assert bool(torch.autograd.grad(loss, student)[0].isfinite().all())


@pytest.mark.parametrize("name", HIDDEN)
def test_refused_hidden_states(name):
    function, module = HIDDEN[name]
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(1, 4\).*must be equal"):
        function(torch.zeros(2, 4), torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"mask has the shape \(3,\); one value for each token, \(2,\)"):
        function(torch.zeros(2, 4), torch.zeros(2, 4), mask=torch.ones(3))
    with pytest.raises(ValueError, match=r"\(2, 3\); \[..., 4\] is needed, by student_width"):
        module(4, 6)(torch.zeros(2, 3), torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"must be equal"):
        module(4, 6)(torch.zeros(2, 4), torch.zeros(2, 5))
    with pytest.raises(TypeError, match="teacher's hidden states came as builtins.tuple"):
        module(4, 6)(torch.zeros(2, 4), (torch.zeros(2, 6),))
    with pytest.raises(ValueError, match="reduction is 'avg'; choices: 'mean', 'batchmean', 'sum', 'none'"):
        function(torch.zeros(2, 4), torch.zeros(2, 4), reduction="avg")


def attention(maps, p):
    flat = (np.abs(maps) ** p).sum(axis=1).reshape(len(maps), -1)
    return flat / np.sqrt((flat**2).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_attention_transfer_is_its_formula(p):
    student, teacher = some(3, 2, 4, 5), some(3, 7, 4, 5, seed=1)
    each = ((attention(student.numpy(), p) - attention(teacher.numpy(), p)) ** 2).mean(axis=1)
    assert functional.attention_transfer(student, teacher, p=p, reduction="none").tolist() == pytest.approx(each)
    for reduction, want in [("mean", each.mean()), ("batchmean", each.mean()), ("sum", each.sum())]:
        assert AttentionTransferLoss(p, reduction)(student, teacher).item() == pytest.approx(want)
    assert AttentionTransferLoss(p)(teacher * 3, teacher).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_gradients_of_attention_transfer(p):
    student, teacher = some(2, 2, 2, 3).requires_grad_(), some(2, 3, 2, 3, seed=1)
    for reduction in ("none", "mean"):
        loss = lambda s: functional.attention_transfer(s, teacher, p=p, reduction=reduction)  # noqa: B023, E731
        assert torch.autograd.gradcheck(loss, (student,))


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_attention_of_zeros_and_of_large_values(p, dtype):
    student = torch.zeros(2, 3, 2, 2, dtype=dtype)
    student[1] = 1000.0
    student.requires_grad_()
    loss = AttentionTransferLoss(p)(student, some(2, 3, 2, 2, dtype=dtype))
    assert loss.dtype == dtype
    assert bool(loss.isfinite())
    assert bool(torch.autograd.grad(loss, student)[0].isfinite().all())


def test_refused_maps():
    maps = torch.zeros(2, 3, 4, 4)
    for other in [torch.zeros(1, 3, 4, 4), torch.zeros(2, 3, 4, 2)]:
        with pytest.raises(ValueError, match="all but the channels"):
            functional.attention_transfer(maps, other)
    with pytest.raises(ValueError, match=r"\(2, 3, 4\); \[batch, channels, height, width\]"):
        functional.attention_transfer(maps[..., 0], maps)
    with pytest.raises(TypeError, match="student's maps came as builtins.list"):
        functional.attention_transfer([maps], maps)


def smooth_l1(x):
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def relative_distances(rows):
    distances = [[math.dist(a, b) for b in rows] for a in rows]
    mean = sum(map(sum, distances)) / (len(rows) * (len(rows) - 1))
    return [[d / mean for d in line] for line in distances]


def angle(rows, i, j, k):
    to_j, to_k = ([b - a for a, b in zip(rows[i], rows[other], strict=True)] for other in (j, k))
    lengths = math.hypot(*to_j) * math.hypot(*to_k)
    return sum(a * b for a, b in zip(to_j, to_k, strict=True)) / lengths if lengths else 0.0


def test_relational_losses_are_their_formulas():
    student, teacher = some(5, 3), some(5, 6, seed=1) * torch.tensor([1.0, 1, 1, 1, 9])[:, None]
    rows_s, rows_t, n = student.tolist(), teacher.tolist(), range(5)
    ds, dt = relative_distances(rows_s), relative_distances(rows_t)
    distance = sum(smooth_l1(ds[i][j] - dt[i][j]) for i in n for j in n) / 25
    assert max(abs(ds[i][j] - dt[i][j]) for i in n for j in n) > 1  # both branches of smooth L1
    triples = [(i, j, k) for i in n for j in n for k in n]
    angles = sum(smooth_l1(angle(rows_s, *ijk) - angle(rows_t, *ijk)) for ijk in triples) / 125
    assert functional.rkd_distance(student, teacher).item() == pytest.approx(distance)
    assert functional.rkd_angle(student, teacher).item() == pytest.approx(angles)
    assert RKDLoss()(student, teacher).item() == pytest.approx(25 * distance + 50 * angles)
    assert RKDLoss(2.0, 0.0)(student, teacher).item() == pytest.approx(2 * distance)
    assert RKDLoss(0.0, 3.0)(student, teacher).item() == pytest.approx(3 * angles)


def test_relational_losses_ignore_size_place_and_rotation():
    teacher = some(6, 3)
    rotation = torch.linalg.qr(some(3, 3, seed=1)).Q
    student = 7 * teacher @ rotation + 2
    assert RKDLoss()(student, teacher).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("function", [functional.rkd_distance, functional.rkd_angle])
def test_gradients_of_relational_losses(function):
    student, teacher = some(4, 3).requires_grad_(), some(4, 5, seed=1)
    assert torch.autograd.gradcheck(lambda s: function(s, teacher), (student,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "rows",
    [[[1.0, 2.0], [1.0, 2.0], [0.0, 1.0]], [[1.0, 2.0]] * 3, [[0.0, 0.0]] * 3],
    ids=["two equal", "all equal", "zeros"],
)
def test_equal_examples_have_finite_gradients(dtype, rows):
    student, teacher = torch.tensor(rows, dtype=dtype, requires_grad=True), some(3, 4, dtype=dtype)
    for one, other in [(student, teacher), (teacher.clone().requires_grad_(), student.detach())]:
        loss = RKDLoss()(one, other)
        assert loss.dtype == dtype
        assert bool(loss.isfinite())
        gradient = torch.autograd.grad(loss, one)[0]
        assert bool(gradient.isfinite().all())
        assert gradient.abs().max().item() < 1e3  # a pole that is only clamped would give some 1e12


def test_a_batch_of_one_has_no_relations():
    student = some(1, 3).requires_grad_()
    loss = RKDLoss()(student, some(1, 4))
    assert loss.item() == 0.0
    assert torch.autograd.grad(loss, student)[0].flatten().tolist() == [0.0] * 3


@pytest.mark.parametrize("shapes", [((2, 3), (3, 3)), ((2, 3, 1), (2, 3)), ((2,), (2,))])
def test_refused_embeddings(shapes):
    for function in (functional.rkd_distance, functional.rkd_angle):
        with pytest.raises(ValueError, match=r"\[batch, width\] with the same batch is needed"):
            function(*map(torch.zeros, shapes))
    with pytest.raises(TypeError, match="teacher's embeddings came as builtins.NoneType"):
        RKDLoss()(torch.zeros(2, 3), None)


def test_the_teacher_gets_no_gradient():
    teacher = some(3, 4).requires_grad_()
    student = some(3, 4, seed=1).requires_grad_()
    maps_s, maps_t = student.reshape(3, 1, 2, 2), teacher.reshape(3, 1, 2, 2)
    losses = [
        functional.hidden_mse(student, teacher),
        functional.hidden_cosine(student, teacher),
        functional.attention_transfer(maps_s, maps_t),
        RKDLoss()(student, teacher),
    ]
    for loss in losses:
        assert torch.autograd.grad(loss, (student, teacher), allow_unused=True)[1] is None


def convolve(maps, conv):
    weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    reach = weight.shape[-1] // 2
    padded = np.pad(maps, [(0, 0), (0, 0), (reach, reach), (reach, reach)])
    out = np.zeros((len(maps), len(weight), *maps.shape[2:]))
    for n, c, i, j in np.ndindex(out.shape):
        window = padded[n, :, i : i + 2 * reach + 1, j : j + 2 * reach + 1]
        out[n, c, i, j] = (window * weight[c]).sum() + bias[c]
    return out


@pytest.mark.parametrize("channels", [(2, 2), (2, 3)])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_mgd_is_its_formula(channels, share):
    torch.manual_seed(0)
    made = MGDLoss(*channels, alpha_mgd=2.5, lambda_mgd=share).double()
    student, teacher = some(2, channels[0], 4, 3), some(2, channels[1], 4, 3, seed=1)
    torch.manual_seed(5)
    loss = made(student, teacher).item()
    torch.manual_seed(5)
    masked = (torch.rand(2, 1, 4, 3) > 1 - share).numpy()
    assert abs(masked.mean() - share) < 0.25
    aligned = student.numpy() if channels[0] == channels[1] else convolve(student.numpy(), made.align)
    hidden = np.maximum(convolve(aligned * ~masked, made.generation[0]), 0)
    want = 2.5 * ((convolve(hidden, made.generation[2]) - teacher.numpy()) ** 2).mean()
    assert loss == pytest.approx(want)


def test_mgd_draws_one_mask_a_forward():
    made, maps = MGDLoss(2, 2), some(2, 2, 4, 4, dtype=torch.float32)
    torch.manual_seed(3)
    made(maps, maps)
    after = torch.rand(1)
    torch.manual_seed(3)
    torch.rand(2 * 4 * 4)
    assert torch.equal(torch.rand(1), after)


def test_mgd_is_trainable_and_has_the_published_names():
    made = MGDLoss(2, 3)
    layers = ["align", "generation.0", "generation.2"]
    assert list(made.state_dict()) == [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    assert list(MGDLoss(3, 3).state_dict()) == list(made.state_dict())[2:]
    made(some(2, 2, 4, 4, dtype=torch.float32), some(2, 3, 4, 4, dtype=torch.float32)).backward()
    assert all(parameter.grad.any() for parameter in made.parameters())


def test_gradients_of_mgd():
    made = MGDLoss(2, 3).double()
    student, teacher = some(1, 2, 2, 3).requires_grad_(), some(1, 3, 2, 3, seed=1)

    def loss(maps):
        torch.manual_seed(0)
        return made(maps, teacher)

    assert torch.autograd.gradcheck(loss, (student,))


@pytest.mark.parametrize("other", [(2, 3, 4, 5), (1, 3, 4, 4), (2, 4, 4, 4)])
def test_mgd_refuses_other_maps(other):
    with pytest.raises(ValueError, match="must be equal"):
        MGDLoss(2, 3)(torch.zeros(2, 2, 4, 4), torch.zeros(other))
    with pytest.raises(TypeError, match="student's maps came as builtins.list"):
        MGDLoss(2, 3)([], torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"\[batch, channels, height, width\]"):
        functional.mgd(torch.zeros(2, 3), torch.zeros(2, 3), nn.Identity())


@pytest.mark.parametrize(
    ("make", "field", "choices"),
    [
        (lambda: MGDLoss(0, 3), "num_student_channels", "above 0"),
        (lambda: MGDLoss(3, -1), "num_teacher_channels", "above 0"),
        (lambda: MGDLoss(3, 3, alpha_mgd=-1.0), "alpha_mgd", "0 or above"),
        (lambda: MGDLoss(3, 3, lambda_mgd=1.5), "lambda_mgd", "between 0 and 1"),
        (lambda: HiddenMSELoss(0, 3), "student_width", "above 0"),
        (lambda: HiddenCosineLoss(3, 0), "teacher_width", "above 0"),
        (lambda: HiddenCosineLoss(3, 3, "avg"), "reduction", "'mean', 'batchmean', 'sum', 'none'"),
        (lambda: AttentionTransferLoss(0.5), "p", "1 or above"),
        (lambda: AttentionTransferLoss(math.nan), "p", "above 0"),
        (lambda: AttentionTransferLoss(2.0, "avg"), "reduction", "'mean', 'batchmean', 'sum', 'none'"),
        (lambda: RKDLoss(distance_weight=-1.0), "distance_weight", "0 or above"),
        (lambda: RKDLoss(angle_weight=math.nan), "angle_weight", "0 or above"),
    ],
)
def test_wrong_settings_are_refused_at_once(make, field, choices):
    with pytest.raises(ValueError, match=f"{field} is .*{choices}"):
        make()
