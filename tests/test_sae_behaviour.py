"""What single architectures do: dead latents, thresholds, biases, random layers, routing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from routesae_cache.optim import build_optimizer
from routesae_cache.saes import FlatLatents, RowLatents, build_sae
from tests.sae_grid import D, F, K, L, N, make_config, make_sae, sparse_data, train


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """At these sizes threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
