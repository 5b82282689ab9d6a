"""One suite over every architecture: the grid of selectors and coders, and the crosscoders."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from routesae_cache.saes.config import TOPK_FAMILY
from tests.sae_grid import (
    GRID,
    SAMPLED,
    D,
    F,
    K,
    L,
    N,
    make_config,
    make_sae,
    randomise,
    sparse_data,
    train,
)
from tests.sae_reference import reference_loss


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


def test_reading_is_inference_that_decodes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = make_sae(name)
    randomise(sae)
    x_NLD = sparse_data(sae.config, N)
    rules = ({}, {"infer_k": 3}, {"theta": 0.5})
    expected = [sae.inference(x_NLD, **rule) for rule in rules]
    monkeypatch.setattr(type(sae.coder), "decode", None)
    for rule, out in zip(rules, expected, strict=True):
        found = sae.read(x_NLD, **rule)
        assert type(found.latents) is type(out.latents)
        for part in ("layer_M", "router_NL"):
            one, other = getattr(found, part), getattr(out, part)
            assert one is other is None or torch.equal(one, other)
        assert torch.equal(found.latents.dense(F), out.latents.dense(F))
        assert not any(part.requires_grad for part in found.latents.pairs())


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
