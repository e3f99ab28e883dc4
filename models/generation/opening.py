"""A decoder's folder opened as a runtime: its graph, the cache that fits the graph, and the batching over both."""

from __future__ import annotations

from models.artifact import Artifact
from models.generation.batching import PART_TOKENS, BatchingRuntime, part_tokens
from models.generation.cache import Cache
from models.generation.graph import DecoderGraph
from models.generation.growing import GrowingCache
from models.generation.layout import Layout
from models.generation.rows import RowCache


def open_runtime(
    artifact: Artifact, layout: Layout, *, threads: int, seats: int, max_bytes: int, context_tokens: int = 0
) -> BatchingRuntime:
    """Open a decoder for `seats` texts at once; `context_tokens` 0 takes the layout's. Raises ModelError."""
    graph = DecoderGraph(artifact, layout, threads=threads)
    context = min(layout.context_tokens, context_tokens or layout.context_tokens)
    context = min(context, max(1, max_bytes // graph.shape.token_bytes))
    parts = PART_TOKENS if graph.keeps_last else part_tokens(graph.vocabulary)
    cache: Cache
    if graph.in_place:
        cache = RowCache(graph, rows=seats, max_tokens=context, part_tokens=parts)
    else:
        cache = GrowingCache(graph, part_tokens=parts)
    return BatchingRuntime(
        cache, seats=seats, context_tokens=context, end_tokens=layout.end_tokens, max_bytes=max_bytes
    )
