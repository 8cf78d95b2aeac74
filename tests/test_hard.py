"""Hard attention: its estimators against the enumerated gradient, its choices and its crops by hand."""

import copy
import io

import pytest
import torch
from tests.reference.hard import bilinear_crop, entropy, expected_reward, gradient
from torch.nn import functional as F

from sightline.attention import LearnToPayAttention
from sightline.attention.hard import Glimpse, HardAttention, MovingBaseline, reinforce_loss
from sightline.explainers import attention_maps

ESTIMATORS = ["reinforce", "gumbel", "top_k"]
SCORES = torch.randn(16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
REWARDS = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def features(size=(5, 4), channels=6, batch=3, dtype=torch.float64):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def block(channels=6, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(1)
    return HardAttention(channels, **options, generator=torch.Generator().manual_seed(seed)).to(dtype)


def grid(images, scores=SCORES, **options):
    """A 4 x 4 grid whose i-th position has the score u_i, `images` times: the parameter u is the scores."""
    attention = block(16, **options)
    with torch.no_grad():
        attention.gate.u.weight.copy_(scores)
        attention.gate.u.bias.zero_()
    return attention, torch.eye(16, dtype=torch.float64).reshape(1, 16, 4, 4).expand(images, -1, -1, -1)


def one_image_gradients(attention, x, baseline, entropy_weight=0.0):
    """Gradient of the score of each image's own loss, (images, 16), and the rewards."""
    pooled = attention(x)  # the i-th vector of the grid is the i-th unit vector: the pooled one is the weights
    reward = (pooled * REWARDS).sum(1)
    loss = reinforce_loss(attention.log_prob, reward, baseline, attention.entropy, entropy_weight=entropy_weight)
    (mean,) = torch.autograd.grad(loss, attention.gate.u.weight, retain_graph=True)
    chosen = pooled.detach()
    return mean[0], (reward.detach() - baseline)[:, None] * (chosen - SCORES.softmax(0)), reward.detach()


def cosine(one, other):
    return F.cosine_similarity(one, torch.as_tensor(other, dtype=one.dtype), dim=0).item()


def test_reinforce_estimates_the_enumerated_gradient():
    wanted = gradient(lambda scores: -expected_reward(scores, REWARDS.tolist()), SCORES.tolist())
    attention, x = grid(20_000, mixed=0.0)
    mean, single, reward = one_image_gradients(attention, x, 0.0)
    assert cosine(mean, wanted) >= 0.99
    torch.testing.assert_close(mean, -single.mean(0))
    assert abs(reward.mean().item() - expected_reward(SCORES.tolist(), REWARDS.tolist())) < 0.03
    frequency = attention(x).mean(0)
    assert (frequency - SCORES.softmax(0)).abs().max() < 0.015


def test_the_entropy_bonus_has_the_enumerated_gradient():
    attention, x = grid(2, mixed=0.0)
    attention(x)
    torch.testing.assert_close(attention.entropy, torch.full((2,), entropy(SCORES.tolist()), dtype=torch.float64))
    zero = torch.zeros(2, dtype=torch.float64)
    loss = reinforce_loss(attention.log_prob, zero, 0.0, attention.entropy, entropy_weight=0.5)
    (got,) = torch.autograd.grad(loss, attention.gate.u.weight)
    wanted = -0.5 * torch.tensor(gradient(entropy, SCORES.tolist()), dtype=torch.float64)
    torch.testing.assert_close(got[0], wanted, rtol=0, atol=1e-8)


def test_the_moving_baseline_lowers_the_variance_and_keeps_the_mean():
    variances, means = [], []
    for with_baseline in (False, True):
        attention, x = grid(20_000, mixed=0.0)
        baseline = MovingBaseline()
        for _ in range(50 if with_baseline else 0):
            baseline(3 + (attention(x[:64]) * REWARDS).sum(1))
        b = baseline.value.item()
        mean, single, _ = one_image_gradients(attention, x, b - 3)  # every reward is 3 higher
        variances.append(single.var(0).sum().item())
        means.append(mean)
        torch.testing.assert_close(mean, -single.mean(0))
    assert variances[1] < 0.2 * variances[0]
    assert cosine(means[1], gradient(lambda s: -expected_reward(s, REWARDS.tolist()), SCORES.tolist())) >= 0.99


def test_the_moving_baseline_by_hand():
    baseline = MovingBaseline(decay=0.9)
    assert [round(baseline(torch.tensor([r, r + 2])).item(), 6) for r in (9.0, 19.0, 0.0)] == [0.0, 1.0, 2.9]
    assert baseline.value.item() == pytest.approx(2.71)
    baseline.eval()(torch.tensor([100.0]))
    assert baseline.value.item() == pytest.approx(2.71) and set(baseline.state_dict()) == {"value"}


def test_the_reward_gets_no_gradient():
    reward = torch.ones(2, requires_grad=True)
    log_prob = torch.zeros(2, requires_grad=True)
    reinforce_loss(log_prob, reward, 0.0, torch.zeros(2)).backward()
    assert reward.grad is None and log_prob.grad.tolist() == [-0.5, -0.5]


def test_mixed_takes_the_soft_weights_of_an_image_and_gives_them_their_own_gradient():
    attention, x = grid(4000, mixed=0.25)
    weights = attention.gate(x).flatten(1)
    soft = (weights - SCORES.softmax(0)).abs().amax(1) < 1e-12
    one_hot = (weights.amax(1) == 1) & (weights.sum(1) == 1)
    assert (soft ^ one_hot).all() and abs(soft.double().mean() - 0.25) < 0.03
    torch.testing.assert_close(attention.log_prob[soft], -attention.entropy[soft])
    (got,) = torch.autograd.grad(attention.log_prob[soft].sum(), attention.gate.u.weight, retain_graph=True)
    assert got.abs().max() < 1e-10  # the score function of a mean is zero
    (got,) = torch.autograd.grad((weights * REWARDS).sum(), attention.gate.u.weight)
    wanted = gradient(lambda scores: expected_reward(scores, REWARDS.tolist()), SCORES.tolist())
    torch.testing.assert_close(got[0], torch.tensor(wanted, dtype=torch.float64) * soft.sum(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grid(9, mixed=1.0)[0].gate(x[:9]), grid(9)[0].gate.soft(x[:9]))


@pytest.mark.parametrize(("estimator", "k"), [("gumbel", 1), ("top_k", 1), ("top_k", 3)])
def test_straight_through_is_hard_forwards_and_soft_backwards(estimator, k):
    attention, x = grid(64, estimator=estimator, k=k, temperature=0.7)
    weights = attention.gate(x).flatten(1)
    assert set(weights.unique().tolist()) == {0.0, 1 / k} and ((weights > 0).sum(1) == k).all()
    (got,) = torch.autograd.grad((weights * REWARDS).sum(), attention.gate.u.weight)
    noise = torch.zeros(64, 16, dtype=torch.float64)
    if estimator == "gumbel":
        again = torch.Generator().manual_seed(0)
        noise = -torch.empty(64, 16, dtype=torch.float64).exponential_(generator=again).log()
    scores = SCORES.clone().requires_grad_()
    soft = ((scores + noise) / 0.7).softmax(1)
    assert torch.equal(weights > 0, soft >= soft.topk(k, dim=1).values[:, -1:])
    (wanted,) = torch.autograd.grad((soft * REWARDS).sum(), scores)
    torch.testing.assert_close(got[0], wanted)


def test_gumbel_draws_from_the_softmax_of_the_scores():
    attention, x = grid(20_000, estimator="gumbel", temperature=0.5)
    assert (attention(x).mean(0) - SCORES.softmax(0)).abs().max() < 0.015  # whatever the temperature


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_eval_takes_the_best_position_and_draws_nothing(estimator):
    attention, x = block(estimator=estimator).eval(), features()
    state = attention.gate.generator.get_state()
    scores = attention.gate.scores(x).flatten(1)
    weights = attention.gate(x)
    assert torch.equal(weights.flatten(1), F.one_hot(scores.argmax(1), 20).double())
    wanted = torch.stack([image.flatten(1)[:, i] for image, i in zip(x, scores.argmax(1), strict=True)])
    assert torch.equal(attention(x), wanted) and attention.out_channels == 6
    assert torch.equal(attention.gate.generator.get_state(), state)
    assert attention.log_prob is None and attention.entropy is None


def test_top_k_is_the_mean_of_the_best_positions():
    attention, x = block(estimator="top_k", k=3), features()
    best = attention.gate.scores(x).flatten(1).sort(descending=True).indices[:, :3]
    wanted = torch.stack([image.flatten(1)[:, i].mean(1) for image, i in zip(x, best, strict=True)])
    torch.testing.assert_close(attention(x), wanted)
    torch.testing.assert_close(attention.eval()(x), wanted)
    every = block(estimator="top_k", k=20)
    torch.testing.assert_close(every(x), x.mean((2, 3)))


def test_soft_and_hard_share_their_scores_and_meet_as_the_temperature_falls():
    x = features()
    for temperature, far, near in ((1.0, 0.2, 1.0), (1e-3, 0.0, 1e-6)):
        attention = block(temperature=temperature).eval()
        distance = (attention.gate.soft(x) - attention.gate(x)).abs().max().item()
        assert far <= distance <= near
    soft = LearnToPayAttention(6, compat="none").double().eval()
    soft.load_state_dict(block().state_dict())
    torch.testing.assert_close(soft.gate(x), block().gate.soft(x))


@pytest.mark.parametrize("compat", ["pc", "dp"])
def test_a_query_may_choose(compat):
    attention, x = block(compat=compat, estimator="top_k").eval(), features()
    query = torch.randn(3, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    scores = attention.gate.scores(x, query).flatten(1)
    assert torch.equal(attention.gate(x, query).flatten(1).argmax(1), scores.argmax(1))
    with pytest.raises(ValueError, match="expected a query"):
        attention(x)


@pytest.mark.parametrize("estimator", ["reinforce", "gumbel"])
def test_random_numbers_come_from_the_generator_alone_if_there_is_one(estimator):
    x = features(batch=50)
    before = torch.get_rng_state()
    one, other, third = (block(estimator=estimator, seed=s) for s in (0, 0, 1))
    torch.set_rng_state(before)
    assert torch.equal(one(x), other(x)) and not torch.equal(one(x), third(x))
    assert torch.equal(torch.get_rng_state(), before)
    one.gate.generator = None
    torch.manual_seed(3)
    drawn = one(x)
    assert not torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(3).get_state())
    torch.manual_seed(3)
    assert torch.equal(one(x), drawn)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_sizes_layouts_types_and_single_images(estimator):
    for size in ((1, 1), (1, 7), (6, 5)):
        attention = block(estimator=estimator)
        weights = attention.gate(features(size))
        assert weights.shape == (3, 1, *size)
        torch.testing.assert_close(weights.sum((2, 3)), torch.ones(3, 1, dtype=torch.float64))
        attention.eval()
        x = features(size)
        wanted = attention(x)
        torch.testing.assert_close(attention(x.contiguous(memory_format=torch.channels_last)), wanted)
        torch.testing.assert_close(torch.cat([attention(x[i : i + 1]) for i in range(3)]), wanted)
    half = block(estimator=estimator, dtype=torch.bfloat16)
    x = features(dtype=torch.bfloat16)
    assert half(x).dtype == half.gate(x).dtype == half.eval()(x).dtype == torch.bfloat16
    assert torch.autograd.gradcheck(block(estimator=estimator).eval(), (features((2, 3)).requires_grad_(),))


def test_a_trained_block_can_be_copied_saved_and_read():
    attention, x = block(), features()
    attention(x)
    assert attention.log_prob.shape == attention.entropy.shape == (3,) and attention.log_prob.requires_grad
    copied = copy.deepcopy(attention)
    assert copied.log_prob is None and attention.log_prob is not None
    assert torch.equal(copied.eval()(x), attention.eval()(x))
    file = io.BytesIO()
    torch.save(attention, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), attention(x))
    other = block()
    other.load_state_dict(attention.state_dict())
    assert torch.equal(attention_maps(torch.nn.Sequential(other), x)["0"], attention.gate(x))


def test_a_hard_glimpse_copies_whole_pixels():
    images = torch.arange(2 * 3 * 8 * 12.0).reshape(2, 3, 8, 12)
    weights = torch.zeros(2, 1, 4, 4)
    weights[0, 0, 1, 2] = 1  # center at row 3, column 7.5
    weights[1, 0, 0, 3] = 1  # center at row 1, column 10.5: the crop stops at the border
    got = Glimpse(3, hard=True)(images, weights)
    assert torch.equal(got, torch.stack([images[0, :, 2:5, 6:9], images[1, :, 0:3, 9:12]]))
    assert torch.equal(Glimpse(8, hard=True)(images[..., :8], weights), images[..., :8])
    assert torch.equal(Glimpse(3, hard=True)(images.bfloat16(), weights.bfloat16()), got.bfloat16())


def test_a_soft_glimpse_is_interpolated_and_follows_the_weights():
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, 3, 9, 11, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 12, generator=generator, dtype=torch.float64).softmax(1).reshape(2, 1, 3, 4)
    glimpse = Glimpse(4)
    got = glimpse(images, weights)
    for n in range(2):
        top = sum(weights[n, 0, i, j].item() * (i + 0.5) * 9 / 3 for i in range(3) for j in range(4)) - 2
        left = sum(weights[n, 0, i, j].item() * (j + 0.5) * 11 / 4 for i in range(3) for j in range(4)) - 2
        wanted = torch.from_numpy(bilinear_crop(images[n].numpy(), top, left, 4))
        torch.testing.assert_close(got[n], wanted, rtol=0, atol=1e-10)
    assert torch.autograd.gradcheck(glimpse, (images.requires_grad_(), weights.requires_grad_()))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: block(estimator="x"), "expected estimator to be one of reinforce, gumbel, top_k; got 'x'"),
        (lambda: block(k=2), "expected k of 1, or more with estimator='top_k'; got 2 with 'reinforce'"),
        (lambda: block(estimator="top_k", k=0), "expected k of 1, .*; got 0 with 'top_k'"),
        (lambda: block(temperature=0.0), "expected a temperature above 0, got 0.0; 1"),
        (lambda: block(mixed=1.5), "expected mixed to be a probability, got 1.5; 0"),
        (lambda: block(compat="x"), "expected compat to be one of pc, dp, none; got 'x'"),
        (lambda: block(estimator="top_k", k=21)(features()), "expected at least k = 21 positions, got 20; choose"),
        (lambda: MovingBaseline(1.0), "expected a decay of 0 or more and below 1, got 1.0; the"),
        (lambda: Glimpse(0), "expected a crop of at least 1 pixel, got 0; choose"),
        (lambda: Glimpse(6)(features(), features(channels=1)), "expected images of at least 6 pixels, got 5 x 4"),
    ],
)
def test_bad_options_are_one_clear_line(run, message):
    with pytest.raises(ValueError, match=message):
        run()


@pytest.mark.compile
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_compile_and_export(estimator):
    attention, x = HardAttention(6, estimator=estimator).double(), features()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    wanted = attention(x)
    torch.manual_seed(0)
    torch.testing.assert_close(compiled(x), wanted)
    if estimator == "reinforce":
        assert attention.log_prob.shape == (3,)
    attention.eval()
    exported = torch.export.export(attention, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    torch.testing.assert_close(exported.module()(x[:2]), attention(x[:2]))
