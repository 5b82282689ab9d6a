"""One suite over every architecture: the grid of selectors and coders, and the crosscoders."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from routesae_cache.optim import build_optimizer
from routesae_cache.saes import FlatLatents, RowLatents, Sae, SaeConfig, build_sae
from routesae_cache.saes.config import TOPK_FAMILY
from tests.sae_reference import reference_loss

N, L, D, F, K = 24, 3, 10, 40, 4

SELECTORS: dict[str, dict[str, Any]] = {
    "fixed": {"selector": "fixed", "layers": (5,)},
    "route-factor": {"selector": "route"},
    "route-straight-through": {"selector": "route", "route_estimator": "straight-through"},
    "route-score": {"selector": "route", "route_estimator": "score"},
    "route-mean": {"selector": "route", "aggregate": "mean"},
    "route-soft": {"selector": "route", "hard": False},
    "random": {"selector": "random"},
    "every": {"selector": "every"},
}
CODERS: dict[str, dict[str, Any]] = {
    "relu": {"coder": "relu", "sparsity_weight": 0.3},
    "gated": {"coder": "gated", "sparsity_weight": 0.3},
    "gated-authors": {"coder": "gated", "sparsity_weight": 0.3, "gated_aux": "authors"},
    "topk": {"coder": "topk", "k": K},
    "batchtopk": {"coder": "batchtopk", "k": K},
    "jumprelu": {
        "coder": "jumprelu",
        "sparsity_weight": 0.01,
        "bandwidth": 0.4,
        "initial_threshold": 0.2,
    },
    "matryoshka": {"coder": "matryoshka", "k": K, "group_sizes": (6, 10, 24)},
}
CROSSCODERS: dict[str, dict[str, Any]] = {
    "crosscoder-relu": CODERS["relu"],
    "crosscoder-relu-norm": CODERS["relu"] | {"crosscoder_weighting": "decoder-norm"},
    "crosscoder-relu-unbiased": CODERS["relu"] | {"crosscoder_bias": False},
    "crosscoder-topk": CODERS["topk"],
    "crosscoder-batchtopk": CODERS["batchtopk"],
    "crosscoder-batchtopk-norm": CODERS["batchtopk"] | {"crosscoder_weighting": "decoder-norm"},
}
GRID: dict[str, dict[str, Any]] = {
    f"{s}+{c}": SELECTORS[s] | CODERS[c] for s in SELECTORS for c in CODERS
} | {name: {"selector": "all"} | options for name, options in CROSSCODERS.items()}


SAMPLED = re.compile("batch|matryoshka|random|score")
"""Architectures whose training differs from inference by design."""


def make_config(name: str, **changes: Any) -> SaeConfig:
    return SaeConfig(**({"layers": (2, 3, 5), "latents": F} | GRID[name] | changes))


def make_sae(name: str, seed: int = 0, **changes: Any) -> Sae:
    return build_sae(make_config(name, **changes), D, seed)


def sparse_data(config: SaeConfig, tokens: int, seed: int = 1) -> Tensor:
    """Tokens that are sparse mixtures of fixed directions, slightly different in every layer."""
    generator = torch.Generator().manual_seed(7)
    directions_AD = torch.randn(30, D, generator=generator)
    generator.manual_seed(seed)
    shape = (tokens, len(config.layers), 30)
    code_NLA = torch.rand(shape, generator=generator) * (
        torch.rand(tokens, 1, 30, generator=generator) < 0.1
    )
    noise_NLD = 0.3 * torch.randn(tokens, len(config.layers), D, generator=generator)
    return code_NLA @ directions_AD * 2 + noise_NLD


def randomise(sae: Sae) -> None:
    """Move every parameter off its special starting value, so that no gradient is trivially 0."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.05 * noise)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """At these sizes threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=GRID)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_shapes(name: str) -> None:
    sae = make_sae(name)
    x_NLD = sparse_data(sae.config, N)
    out = sae(x_NLD)
    coded = N * L if sae.config.selector in ("every", "all") else N
    assert out.loss.shape == ()
    assert out.nmse_M.shape == (coded,)
    assert out.target_MD.shape == out.reconstruction_MD.shape == (coded, D)
    rows = N if sae.config.selector == "all" else coded
    assert out.latents.l0_M().shape == (rows,)
    assert out.latents.dense(F).shape == (rows, F)
    assert sae.direction_FD().shape == (F, D)
    if sae.config.selector == "route":
        assert out.router_NL is not None
        torch.testing.assert_close(out.router_NL.sum(-1), torch.ones(N))
    if out.layer_M is not None:
        scale_M = torch.ones(coded) if out.scale_M is None else out.scale_M
        token_M = torch.arange(coded) // (coded // N)
        torch.testing.assert_close(out.target_MD, x_NLD[token_M, out.layer_M] * scale_M[:, None])


def test_loss_and_every_gradient_equal_a_dense_reference(name: str) -> None:
    sae = make_sae(name).double()
    randomise(sae)
    x_NLD = sparse_data(sae.config, N).double()
    out = sae(x_NLD)
    out.loss.backward()
    parameters = {n: p.detach().clone().requires_grad_() for n, p in sae.named_parameters()}
    expected = reference_loss(sae, x_NLD, parameters)
    expected.backward()
    torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=1e-12)
    for n, parameter in sae.named_parameters():
        grad = parameter.grad
        want = parameters[n].grad
        want = torch.zeros_like(parameter) if want is None else want
        grad = torch.zeros_like(parameter) if grad is None else grad
        torch.testing.assert_close(
            grad, want, rtol=1e-9, atol=1e-12, msg=lambda m, n=n: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", [n for n in GRID if GRID[n]["coder"] in TOPK_FAMILY])
def test_gradients_with_auxk_equal_a_dense_reference(name: str) -> None:
    sae = make_sae(name, auxk=3).double()
    randomise(sae)
    sae.tokens_since_fired_F[::4] = 10**6
    sae.after_step(10)
    x_NLD = sparse_data(sae.config, N).double()
    out = sae(x_NLD)
    out.loss.backward()
    assert out.terms["auxk"] > 0
    parameters = {n: p.detach().clone().requires_grad_() for n, p in sae.named_parameters()}
    reference_loss(sae, x_NLD, parameters, dead_index=torch.arange(0, F, 4)).backward()
    for n, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[n].grad, rtol=1e-9, atol=1e-12)


def test_float32_gradients_are_close_to_float64(name: str) -> None:
    single, double = make_sae(name), make_sae(name).double()
    x_NLD = sparse_data(single.config, N)
    single(x_NLD).loss.backward()
    double(x_NLD.double()).loss.backward()
    for (n, p), q in zip(single.named_parameters(), double.parameters(), strict=True):
        if p.grad is None or q.grad is None:
            assert p.grad is q.grad, n
            continue
        torch.testing.assert_close(p.grad, q.grad.float(), rtol=2e-3, atol=1e-5)


def test_decoder_norms_after_training(name: str) -> None:
    sae = make_sae(name)
    randomise(sae)
    sae.finish()
    norms = torch.stack([sae.direction_FD(i).norm(dim=-1) for i in range(sae.coder.stacked)])
    if sae.config.crosscoder_weighting == "decoder-norm":
        assert (norms - 1).abs().max() > 0.01, "the norms are part of this loss and stay free"
    else:
        torch.testing.assert_close(norms, torch.ones_like(norms))


def test_decoder_norms_every_ten_steps(name: str) -> None:
    sae = make_sae(name)
    randomise(sae)
    before = sae.coder.decoder.detach().clone()
    sae.after_step(9)
    assert torch.equal(sae.coder.decoder, before)
    sae.after_step(10)
    unit = sae.config.crosscoder_weighting == "plain"
    assert torch.equal(sae.coder.decoder, before) is not unit


def test_l0_is_as_asked(name: str) -> None:
    sae = make_sae(name)
    x_NLD = sparse_data(sae.config, N)
    l0_M = sae(x_NLD).latents.l0_M()
    if sae.config.coder == "topk":
        assert (l0_M == K).all()
    elif sae.config.coder in TOPK_FAMILY:
        assert l0_M.sum() == K * l0_M.shape[0]
        assert l0_M.unique().shape[0] > 1, "BatchTopK shares its budget unevenly"
    assert (sae.inference(x_NLD, infer_k=2).latents.l0_M() <= 2).all()
    above = sae.inference(x_NLD, theta=0.7).latents.pairs().value_P
    assert above.shape[0] > 0
    assert (above > 0.7).all()


def test_inference_uses_the_latents_it_reports(name: str) -> None:
    sae = make_sae(name)
    randomise(sae)
    x_NLD = sparse_data(sae.config, N)
    for rule in ({}, {"infer_k": 3}, {"theta": 0.5}):
        out = sae.inference(x_NLD, **rule)
        decoded = sae.coder.decode_dense(out.latents.dense(F)).reshape(-1, D)
        torch.testing.assert_close(out.reconstruction_MD, decoded, rtol=1e-4, atol=1e-5)
        assert not out.loss.requires_grad


@pytest.mark.parametrize("name", [n for n in GRID if not SAMPLED.search(n)])
def test_inference_equals_training_where_the_rule_is_per_vector(name: str) -> None:
    sae = make_sae(name)
    x_NLD = sparse_data(sae.config, N)
    torch.testing.assert_close(sae(x_NLD).nmse_M, sae.inference(x_NLD).nmse_M)


def test_latents_agree_with_themselves(name: str) -> None:
    latents = make_sae(name)(sparse_data(make_config(name), N)).latents
    dense_MF = latents.dense(F)
    pairs = latents.pairs()
    rebuilt_MF = torch.zeros_like(dense_MF)
    rebuilt_MF[pairs.row_P, pairs.index_P] = pairs.value_P
    assert torch.equal(rebuilt_MF, dense_MF)
    assert torch.equal(latents.l0_M(), (dense_MF != 0).sum(-1))
    assert torch.equal(latents.fired_F(F), (dense_MF != 0).any(0))
    assert bool((pairs.row_P.diff() >= 0).all())


def test_save_and_load(name: str) -> None:
    trained, fresh = make_sae(name, seed=0), make_sae(name, seed=1)
    train(trained, steps=12)
    x_NLD = sparse_data(trained.config, N)
    trained.eval()
    fresh.load_state_dict(trained.state_dict(), strict=True)
    fresh.eval()
    assert torch.equal(fresh(x_NLD).loss, trained(x_NLD).loss)
    assert torch.equal(
        fresh.inference(x_NLD).reconstruction_MD, trained.inference(x_NLD).reconstruction_MD
    )
    assert torch.equal(fresh.tokens_since_fired_F, trained.tokens_since_fired_F)


def test_strict_loading_names_the_tensor(name: str) -> None:
    sae = make_sae(name)
    state = sae.state_dict()
    del state["coder.encoder"]
    with pytest.raises(RuntimeError, match=r"coder\.encoder"):
        sae.load_state_dict(state)


def train(sae: Sae, steps: int) -> list[float]:
    optimizer = build_optimizer(sae.parameters(), lr=5e-3)
    losses = []
    for step in range(1, steps + 1):
        out = sae(sparse_data(sae.config, 64, seed=step))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sae.after_step(step)
        losses.append(out.loss.item())
    return losses


def test_loss_falls(name: str) -> None:
    losses = train(make_sae(name), steps=25)
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_same_seed_same_result(name: str) -> None:
    first, second, other = make_sae(name, seed=5), make_sae(name, seed=5), make_sae(name, seed=6)
    train(first, steps=3)
    train(second, steps=3)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    assert not torch.equal(first.coder.encoder, other.coder.encoder)


def test_order_within_a_batch_does_not_matter(name: str) -> None:
    sae, shuffled = make_sae(name).double(), make_sae(name).double()
    x_NLD = sparse_data(sae.config, N).double()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    out, permuted = sae(x_NLD), shuffled(x_NLD[order])
    torch.testing.assert_close(permuted.loss, out.loss)
    torch.testing.assert_close(
        permuted.nmse_M.view(N, -1), out.nmse_M.view(N, -1)[order], rtol=1e-9, atol=1e-12
    )
    out.loss.backward()
    permuted.loss.backward()
    for p, q in zip(sae.parameters(), shuffled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def test_inference_changes_no_state(name: str) -> None:
    sae = make_sae(name)
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    sae.inference(sparse_data(sae.config, N))
    assert all(torch.equal(value, before[key]) for key, value in sae.state_dict().items())


def test_both_inference_rules_contradict(name: str) -> None:
    sae = make_sae(name)
    x_NLD = sparse_data(sae.config, 2)
    with pytest.raises(ValueError, match="infer_k=2 and theta"):
        sae.inference(x_NLD, infer_k=2, theta=0.1)
    with pytest.raises(ValueError, match=f"latents={F}; got 41"):
        sae.inference(x_NLD, infer_k=41)


def test_forced_layers(name: str) -> None:
    sae = make_sae(name)
    x_NLD = sparse_data(sae.config, N)
    layer_N = torch.arange(N) % len(sae.config.layers)
    chooses = sae.config.selector == "random" or (
        sae.config.selector == "route" and sae.config.hard
    )
    if not chooses:
        with pytest.raises(ValueError, match="can be forced only"):
            sae.inference(x_NLD, layer_index_N=layer_N)
        return
    out = sae.inference(x_NLD, layer_index_N=layer_N)
    own = sae.inference(x_NLD)
    assert out.layer_M is not None
    assert own.layer_M is not None
    assert torch.equal(out.layer_M, layer_N)
    same_N = own.layer_M == layer_N
    assert 0 < same_N.sum() < N
    torch.testing.assert_close(out.nmse_M[same_N], own.nmse_M[same_N])


def test_latents_come_in_the_form_that_suits_the_coder() -> None:
    x_NLD = sparse_data(make_config("fixed+topk"), N)
    assert isinstance(make_sae("fixed+topk")(x_NLD).latents, RowLatents)
    assert isinstance(make_sae("fixed+batchtopk")(x_NLD).latents, FlatLatents)


def test_dead_latents_are_counted_and_revived() -> None:
    sae = make_sae("fixed+topk", auxk=F, dead_window_tokens=3 * N)
    with torch.no_grad():
        sae.coder.get_parameter("latent_bias")[:5] = -100.0
    x_NLD = sparse_data(sae.config, N)
    for step in range(1, 11):
        out = sae(x_NLD)
        sae.after_step(step)
    fired_F = out.latents.fired_F(F)
    assert not fired_F[:5].any()
    assert (sae.tokens_since_fired_F[:5] == 10 * N).all()
    assert (sae.tokens_since_fired_F[fired_F] == 0).all()
    assert sae.dead_F[:5].all()
    sae(x_NLD).loss.backward()
    grad = sae.coder.encoder.grad
    assert grad is not None
    assert (grad[:5].abs().sum(-1) > 0).all(), "AuxK reaches the dead latents"
    alive = make_sae("fixed+topk", auxk=0)
    alive.load_state_dict(sae.state_dict())
    assert "auxk" not in alive(x_NLD).terms


def test_auxk_is_on_by_default_where_latents_are_many() -> None:
    assert make_config("fixed+topk").resolved_auxk(512) == 0
    assert make_config("fixed+topk", latents=4096).resolved_auxk(512) == 256
    assert make_config("fixed+topk", latents=4096, auxk=0).resolved_auxk(512) == 0


def test_batchtopk_threshold_reproduces_the_budget_at_inference() -> None:
    sae = make_sae("fixed+batchtopk")
    train(sae, steps=60)
    l0_M = sae.inference(sparse_data(sae.config, 500, seed=999)).latents.l0_M()
    assert 0.8 * K < l0_M.float().mean() < 1.2 * K


def test_bias_starts_as_asked() -> None:
    for start in ("zero", "mean", "median"):
        sae = make_sae("fixed+topk", init_bias=start)
        x_NLD = sparse_data(sae.config, 200) + 3.0
        x_NLD[0] = 1e4
        sae.initialise_bias(x_NLD)
        bias_D = sae.coder.pre_bias
        assert bias_D is not None
        if start == "zero":
            assert not bias_D.any()
        elif start == "mean":
            torch.testing.assert_close(bias_D.detach(), x_NLD[:, 0].mean(0))
        else:
            assert (bias_D - 3.0).abs().max() < 1.0, "one outlier hardly moves the median"


def test_random_layers_are_uniform_and_change_with_step_and_seed() -> None:
    sae, other = make_sae("random+topk", seed=0), make_sae("random+topk", seed=1)
    x_NLD = sparse_data(sae.config, 3000)
    first_N = sae(x_NLD).layer_M
    counts_L = torch.bincount(first_N, minlength=L)
    assert (counts_L - 1000).abs().max() < 120, "more than 4 standard deviations off"
    sae.after_step(1)
    assert 0.55 < (sae(x_NLD).layer_M != first_N).float().mean() < 0.78
    assert 0.55 < (other(x_NLD).layer_M != first_N).float().mean() < 0.78


def test_the_router_learns_which_layer_is_easy() -> None:
    """Layer 1 holds one direction plus noise, the others noise: only there can k=1 succeed."""
    config = make_config("route-score+topk", k=1, layers=(0, 1, 2))
    sae = build_sae(config, D, 0)
    optimizer = build_optimizer(sae.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    easy_D = torch.randn(D, generator=generator)
    for step in range(1, 151):
        x_NLD = torch.randn(128, 3, D, generator=generator)
        x_NLD[:, 1] = easy_D * 2 + 0.1 * x_NLD[:, 1]
        out = sae(x_NLD)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sae.after_step(step)
    assert out.router_NL is not None
    assert out.router_NL[:, 1].mean() > 0.9
