"""A plan as a table for people."""

from __future__ import annotations

from dsvl_train.models.costs import usual_tiles
from dsvl_train.planning.memory import ChunkPlan, LayoutPlan, RankPlan

GIB, MIB = 1024**3, 1024**2
Row = tuple[str, ...]
_HEADER: Row = ("rank", "chunk", "holds", "parameters", "weights", "gradients", "optimiser", "activations", "working", "together")
_BEFORE = ("siglip.embed", "sam.embed", "embedding")
_NAMES = {"text": "text steps", "multimodal": "image steps"}


def describe(plan: LayoutPlan) -> list[str]:
    """The layout and the micro-batch, in words."""
    cfg, parallel, data = plan.cfg, plan.cfg.parallel, plan.cfg.data
    names = ["tp", "pp", "vpp", "ep"]
    sizes = " · ".join(f"{name} {getattr(parallel, name)}" for name in names if getattr(parallel, name) > 1)
    experts = f" (experts {plan.expert_dp})" if cfg.model.language.moe and plan.expert_dp != plan.dp else ""
    numerics = f"{'CUDA' if plan.numerics.fused else 'CPU'}, {'bf16' if plan.numerics.bytes == 2 else 'fp32'}"
    processes = f"{plan.world_size} process{'es' if plan.world_size > 1 else ''}"
    usual = usual_tiles(plan.cfg.model, data.seq_len * data.micro_batch_size)
    tiles = f", at most {plan.tiles:.3g} tiles (usually {usual:.3g})" if "multimodal" in plan.times.bubble else ""
    return [
        f"{cfg.model.name}, stage {cfg.stage.name}, on {processes}: {sizes + ' · ' if sizes else ''}dp {plan.dp}{experts}; {numerics}",
        f"micro-batch: {data.micro_batch_size} x {data.seq_len} tokens{tiles}; {plan.micro_batches} of them a step and data-parallel rank",
    ]


def table(plan: LayoutPlan) -> list[str]:
    """Rank by rank and chunk by chunk; a chunk's activations are those of a micro-batch times the micro-batches in flight."""
    unit = GIB if plan.peak >= GIB else MIB
    rows: list[Row] = [_HEADER]
    for number, rank in enumerate(plan.ranks):
        rows += [_chunk_row(number, rank, chunk, unit) for chunk in rank.chunks]
        rows.append(_sum_row(number, rank, unit))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER))]
    left = {1, 2}
    lines = []
    for row in rows:
        cells = [cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    ruler = "-" * max(map(len, lines))
    return [f"in {'GiB' if unit == GIB else 'MiB'}", lines[0], ruler, *lines[1:], ruler]


def bubbles(plan: LayoutPlan) -> str:
    """What of the ranks' time idles."""
    by = "FLOPs" if (measured := plan.cfg.parallel.layer_costs) is None else f"the times in {measured}"
    shares = ", ".join(f"{_NAMES[modality]} {share:.1%}" for modality, share in plan.times.bubble.items())
    return f"pipeline bubble: {shares} (by {by}, communication left out)" if plan.division.pp > 1 else "no pipeline, no bubble"


def fullest(plan: LayoutPlan) -> tuple[int, RankPlan]:
    """The pipeline rank that needs most."""
    return max(enumerate(plan.ranks), key=lambda item: item[1].peak)


def gib(size: float) -> str:
    """Bytes in GiB."""
    return f"{_digits(size / GIB)} GiB"


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _chunk_row(number: int, rank: RankPlan, chunk: ChunkPlan, unit: int) -> Row:
    modality = rank.fuller_step
    kept = f"{_digits(chunk.kept[modality] / unit)} x {chunk.in_flight[modality]}" if modality in chunk.in_flight else "-"
    sizes = (_digits(size / unit) for size in (chunk.weights, chunk.gradients, chunk.optimiser))
    return (str(number), chunk.name, _holds(chunk), f"{chunk.parameters:,}", *sizes, kept, "", "")


def _sum_row(number: int, rank: RankPlan, unit: int) -> Row:
    parameters = sum(chunk.parameters for chunk in rank.chunks)
    return (str(number), "sum", "", f"{parameters:,}", *(_digits(size / unit) for size in (*rank.parts.values(), rank.peak)))


def _holds(chunk: ChunkPlan) -> str:
    layers = [("siglip", chunk.siglip), ("sam", chunk.sam), ("layers" if chunk.name != "vision" else "", chunk.language)]
    words = [f"{name} {_range(numbers)}" for name, numbers in layers if numbers]
    before = [part.removesuffix(".embed") + " patches" if part.endswith(".embed") else part for part in chunk.others if part in _BEFORE]
    after = [part.removesuffix(".finish") + " output" if part.endswith(".finish") else part for part in chunk.others if part not in _BEFORE]
    return ", ".join([*before, *words, *after]) or "nothing"


def _range(numbers: range) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
