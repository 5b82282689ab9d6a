"""Whole training steps of a TopK SAE against the encoder's product alone, and against other code.

    python benchmarks/train_step.py [--quick] [--threads 2] [--peers]

Everything runs in one process in interleaved rounds, so that each ratio compares neighbours in
time. A table gives the median over the rounds, the spread (half the interquartile range), and the
median of the rounds' ratios. Shapes: A D=576 F=4608 K=32, 4096 tokens a step; B D=2048 F=16384
K=64, 1024 tokens. Peers are timed where they are installed; none is a dependency.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from routesae_cache.kernels import keep_freed_memory, product
from routesae_cache.optim import build_optimizer
from routesae_cache.saes import SaeConfig, build_sae

Step = Callable[[], object]
REFERENCE = "torch.mm float32"


class Shape(NamedTuple):
    """One workload."""

    width: int
    latents: int
    k: int
    tokens: int


SHAPES = {"A": Shape(576, 4608, 32, 4096), "B": Shape(2048, 16384, 64, 1024)}
ROUTED_LAYERS = 9


def data(shape: Shape, layers: int = 1) -> Tensor:
    """Random tokens of unit mean square."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape.tokens, layers, shape.width, generator=generator)


def products(shape: Shape) -> dict[str, Step]:
    """The encoder's product alone."""
    x_ND = data(shape)[:, 0]
    weight_FD = torch.randn(shape.latents, shape.width) * shape.width**-0.5
    low_ND, low_FD = x_ND.bfloat16(), weight_FD.bfloat16()
    return {
        REFERENCE: lambda: x_ND @ weight_FD.T,
        "oneDNN float32": lambda: product(x_ND, weight_FD),
        "torch.mm bfloat16": lambda: low_ND @ low_FD.T,
    }


def our_step(shape: Shape, name: str, options: dict[str, object], layers: int = 1) -> Step:
    """A whole step: forward, backward, Adam, decoder norms every ten steps."""
    config = SaeConfig(latents=shape.latents, layers=tuple(range(layers)), **options)  # type: ignore[arg-type]
    sae = build_sae(config, shape.width, seed=0)
    optimizer = build_optimizer(sae.parameters())
    x_NLD = data(shape, layers)
    steps = iter(range(1, 1_000_000))

    def step() -> None:
        sae(x_NLD).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sae.after_step(next(steps))

    step.__name__ = name
    return step


def our_steps(shape: Shape) -> dict[str, Step]:
    """TopK on one layer, in both encode dtypes, and routed."""
    topk = {"selector": "fixed", "coder": "topk", "k": shape.k}
    routed = topk | {"selector": "route", "route_estimator": "straight-through"}
    low = {"encode_dtype": "bfloat16"}
    return {
        "ours float32": our_step(shape, "topk", topk),
        "ours bfloat16 selection": our_step(shape, "topk-low", topk | low),
        f"ours routed over {ROUTED_LAYERS}, float32": our_step(
            shape, "routed", routed, ROUTED_LAYERS
        ),
    }


def plain_dense(shape: Shape) -> Step:
    """The usual implementation: linear, topk, scatter, linear, backward, Adam."""
    encoder = nn.Linear(shape.width, shape.latents)
    decoder = nn.Linear(shape.latents, shape.width)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=5e-4)
    x_ND = data(shape)[:, 0].contiguous()

    def step() -> None:
        pre_NF = encoder(x_ND - decoder.bias)
        top = pre_NF.topk(shape.k, dim=-1)
        code_NF = torch.zeros_like(pre_NF).scatter(-1, top.indices, top.values)
        F.mse_loss(decoder(code_NF), x_ND).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sparsify(shape: Shape) -> Step:
    """eai-sparsify's SparseCoder with our fused Adam."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=shape.latents, k=shape.k)
    coder = SparseCoder(shape.width, config)
    optimizer = build_optimizer(coder.parameters())
    x_ND = data(shape)[:, 0].contiguous()

    def step() -> None:
        coder(x_ND).fvu.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def saelens(shape: Shape) -> Step:
    """SAELens' TopKTrainingSAE.training_forward_pass with our fused Adam."""
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    config = TopKTrainingSAEConfig(d_in=shape.width, d_sae=shape.latents, k=shape.k, device="cpu")
    sae = TopKTrainingSAE(config)
    optimizer = build_optimizer(sae.parameters())
    step_input = TrainStepInput(
        sae_in=data(shape)[:, 0].contiguous(),
        coefficients={},
        dead_neuron_mask=None,
        n_training_steps=0,
        is_logging_step=False,
    )

    def step() -> None:
        sae.training_forward_pass(step_input).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def dictionary_learning(shape: Shape) -> Step:
    """dictionary-learning's TopKTrainer.update, as it is."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(
        steps=1_000_000,
        activation_dim=shape.width,
        dict_size=shape.latents,
        k=shape.k,
        layer=0,
        lm_name="none",
        device="cpu",
    )
    x_ND = data(shape)[:, 0].contiguous()
    return lambda: trainer.update(1, x_ND)


PEERS: dict[str, tuple[str, Callable[[Shape], Step]]] = {
    "eai-sparsify": ("sparsify", sparsify),
    "SAELens": ("sae_lens", saelens),
    "dictionary-learning": ("dictionary_learning", dictionary_learning),
}


def time_rounds(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(label: str, shape: Shape, seconds: dict[str, list[float]]) -> None:
    """Print one shape's table."""
    print(f"\n{label}: D={shape.width} F={shape.latents} K={shape.k} tokens={shape.tokens}")
    print(f"{'':34s}{'µs/token':>10s}{'±':>8s}{'tokens/s':>12s}{'÷ product':>11s}{'× ours':>9s}")
    reference = seconds[REFERENCE]
    ours = seconds["ours float32"]
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4)
        per_token = 1e6 / shape.tokens
        share = statistics.median(r / t for r, t in zip(reference, times, strict=True))
        speedup = statistics.median(t / o for o, t in zip(ours, times, strict=True))
        print(
            f"{name:34s}{middle * per_token:10.1f}{(high - low) / 2 * per_token:8.1f}"
            f"{shape.tokens / middle:12,.0f}{share:11.2f}{speedup:9.2f}"
        )


def main() -> None:
    """Parse arguments, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 15")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", default="AB", help="A, B or AB")
    parser.add_argument("--peers", action="store_true", help="time the peers that are installed")
    parser.add_argument(
        "--default-malloc", action="store_true", help="leave the C library's allocation as it is"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.default_malloc:
        keep_freed_memory()
    print(f"torch {torch.__version__}, {arguments.threads} threads")
    for label in arguments.shapes:
        shape = SHAPES[label]
        steps = products(shape) | our_steps(shape) | {"plain dense PyTorch": plain_dense(shape)}
        for name, (module, build) in PEERS.items() if arguments.peers else ():
            if importlib.util.find_spec(module):
                steps[name] = build(shape)
            else:
                print(f"{name} is not installed")
        report(label, shape, time_rounds(steps, rounds=3 if arguments.quick else 15))


if __name__ == "__main__":
    main()
