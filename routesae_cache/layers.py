"""Which layers a command line means, in the index that `lm` defines."""

import re

_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def parse_layers(text: str, n_layers: int) -> tuple[int, ...]:
    """The layers that a text names, in ascending order, each once.

    `auto` is n//4 … 3n//4 of a model of n blocks, both included (the paper's range); `all` is
    0 … n; otherwise layers and ranges with commas between: `12`, `7-22`, `1-3,9`. ValueError
    for anything else and for a layer beyond 0 … n.
    """
    if text == "auto":
        return tuple(range(n_layers // 4, default_layer(n_layers) + 1))
    if text == "all":
        return tuple(range(n_layers + 1))
    layers: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ValueError(
                f"cannot read {part!r} as layers; expected 'auto', 'all', or layers of "
                f"0-{n_layers} such as '7-22', '4,8,12' or '1-3,9'"
            )
        if last > n_layers:
            raise ValueError(
                f"there is no layer {last} in a model of {n_layers} blocks; its layers are "
                f"0 (the embedding) to {n_layers} (after the last block)"
            )
        layers.update(range(first, last + 1))
    return tuple(sorted(layers))


def default_layer(n_layers: int) -> int:
    """The layer that a single-layer SAE reads unless told: three quarters up, as in the paper."""
    return 3 * n_layers // 4
