"""`routesae store`: info, verify, recode."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from cli.console import bar, err, layer_list, layer_name, out, size
from cli.options import (
    Codec,
    CodecKind,
    EndpointUrl,
    KeyframeEvery,
    Step,
    StoreArgument,
    build_codec,
)

if TYPE_CHECKING:
    from stores.reader import StoreReader
    from stores.spec import Split

SPLITS: tuple[Split, ...] = ("eval", "train")
Source = Annotated[str, typer.Argument(help="Store to read: a path or a URL.", metavar="SRC")]
Target = Annotated[str, typer.Argument(help="Store to make or go on with.", metavar="DST")]


def info(
    store: StoreArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Show what is in a store, how big it is, what its codec loses and where it came from."""
    from stores.reader import StoreReader

    facts = _facts(StoreReader(store))
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    spec = facts["spec"]
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    model, text = spec["model"], spec["text"]
    revision = f", revision {model['revision']}" if model.get("revision") else ""
    bits = facts["bits_per_value"]
    for name, value in (
        ("model", f"{model['name']} ({model['dtype']}{revision}), weights {model['weights'][:12]}"),
        ("text", f"{text['dataset']}, {spec['packing']}, seed {text.get('seed')}"),
        ("layers", f"{layer_list(tuple(spec['layers']))} of 0-{spec['n_blocks']}"),
        ("width", f"{spec['width']}"),
        ("rows", f"{facts['rows']:,} of {spec['context']} tokens"),
        ("tokens", f"{spec['train_tokens']:,} train, {spec['eval_tokens']:,} eval"),
        ("committed", _committed(facts)),
        ("codec", f"{spec['codec']}"),
        ("on disk", size(facts["bytes"])),
        ("bits a value", f"{bits:.2f}" if bits else "nothing committed yet"),
    ):
        table.add_row(name, value)
    if bits:
        table.add_row("smaller", f"{16 / bits:.1f}x than bf16, {32 / bits:.1f}x than fp32")
    out.print(table)
    layers = Table(title="Codec distortion", title_justify="left")
    layers.add_column("layer")
    layers.add_column("NMSE", justify="right")
    for layer, nmse in zip(spec["layers"], facts["distortion"], strict=True):
        layers.add_row(layer_name(layer), f"{nmse:.2e}")
    out.print(layers)


def _committed(facts: dict[str, Any]) -> str:
    text = f"{facts['committed_chunks']} of {facts['chunks']} chunks"
    if facts["committed_chunks"] == facts["chunks"]:
        return text
    splits = facts["splits"]
    parts = (f"{name} {each['committed']} of {each['chunks']}" for name, each in splits.items())
    text += ": " + ", ".join(parts)
    if splits["train"]["so_far"] < splits["train"]["committed"]:
        text += f", the first {splits['train']['so_far']} without a gap"
    return text


def _facts(reader: StoreReader) -> dict[str, Any]:
    from stores.stats import split_stats, stored_bytes

    spec, stored = reader.spec, stored_bytes(reader.path)
    chunks = [spec.chunk_range(chunk) for chunk in reader.committed]
    tokens = sum(part.stop - part.start for part in chunks) * spec.context
    if tokens and spec.packing == "document":
        tokens = sum(int(reader.rows(chunk).lengths_R.sum()) for chunk in reader.committed)
    values = tokens * spec.values_per_token
    return {
        "spec": spec.to_dict(),
        "rows": spec.rows,
        "chunks": spec.chunks,
        "committed_chunks": len(reader.committed),
        "splits": {
            split: {
                "chunks": len(spec.split_chunks(split)),
                "committed": len(reader.chunks(split, complete=False)),
                "so_far": len(reader.prefix(split)),
            }
            for split in SPLITS
        },
        "committed_tokens": tokens,
        "bytes": stored,
        "bits_per_value": 8 * stored / values if values else None,
        "distortion": split_stats(reader).distortion_L.tolist(),
    }


def verify(store: StoreArgument, endpoint_url: EndpointUrl = None) -> None:
    """Read every committed chunk and check every byte; exit code 1 with a list of what is bad."""
    from stores.reader import StoreReader

    reader = StoreReader(store)
    bad = []
    with bar("Verifying", total=len(reader.committed)) as update:
        for chunk, fault in reader.verify():
            if fault is not None:
                bad.append(fault)
            update(completed=reader.committed.index(chunk) + 1)
    missing = reader.spec.chunks - len(reader.committed)
    if missing:
        out.print(f"{missing} of {reader.spec.chunks} chunks are not harvested yet.")
    for fault in bad:
        err.print(f"bad: chunk {fault.chunk}, array {fault.array}: {fault.reason}", soft_wrap=True)
    if bad:
        err.print(f"{store}: {len({f.chunk for f in bad})} of {len(reader.committed)} chunks bad")
        raise typer.Exit(1)
    out.print(f"{store}: all {len(reader.committed)} committed chunks are good.")


def recode(
    source: Source,
    target: Target,
    codec: Codec = CodecKind.delta,
    step: Step = None,
    keyframe_every: KeyframeEvery = None,
    endpoint_url: EndpointUrl = None,
) -> None:
    """Write a store again in another codec, without the model."""
    resolved = build_codec(codec, step, keyframe_every)
    from routesae_cache.whole_files import named_full_disk
    from stores.layout import read_spec
    from stores.recode import recode as run_recode

    spec, share_left = read_spec(source), 1.0
    bits = resolved.estimated_bits(len(spec.layers), spec.width) * spec.values_per_token

    def show(done: int, total: int) -> None:
        nonlocal share_left
        if share_left == 1:
            update(begin=done)
        share_left = 1 - done / total
        update(completed=done, total=total)

    with (
        bar("Recoding") as update,
        named_full_disk(target, lambda: share_left * spec.tokens * bits / 8),
    ):
        chunks = run_recode(source, target, resolved, on_chunk=show)
    out.print(f"{chunks} chunks in {target}; look at it: routesae store info {target}")


def copy(source: Source, target: Target, endpoint_url: EndpointUrl = None) -> None:
    """Copy a store to another place, checking every byte of it there; goes on where it stopped."""
    from stores.copy import copy_store

    with bar("Copying") as update:
        copied = copy_store(
            source, target, on_chunk=lambda done, total: update(completed=done, total=total)
        )
    out.print(
        f"{copied.chunks} chunks are in {target}, {copied.copied} of them copied and read back now "
        f"({size(copied.bytes)}); look at it: routesae store info {target}"
    )
    if copied.left:
        out.print(f"{copied.left} chunks are not harvested yet in {source}.")
