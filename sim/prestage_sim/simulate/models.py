"""What the simulator needs to know of a model beyond its shape: which bytes a token touches."""

from __future__ import annotations

from dataclasses import dataclass, replace

from prestage_hw.contract import PRESETS
from prestage_sim.traces import Trace, TraceError, model_config

__all__ = ["CARDS", "ModelCard", "model_card"]


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Sizes of a model.

    Parameters
    ----------
    name : :class:`str`
        Name of the model.
    layers, experts, top_k : :class:`int`
        Its shape (L, E, k).
    expert_bytes : :class:`int`
        Size of a routed expert.
    weight_bits : :class:`float`
        Bits of a weight of an expert, with scales.
    attention_bytes : :class:`float` or None
        What a layer reads for one token before its routing is known: attention and router. The KV
        cache is left out: at the traces' 512 tokens it is some percent of that. None where it isn't
        known: it then takes as long as the k experts.
    shared_bytes : :class:`float`
        Experts of a layer that every token uses.
    source : :class:`str`
        Where the sizes come from.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    expert_bytes: int
    weight_bits: float = 16.0
    attention_bytes: float | None = None
    shared_bytes: float = 0.0
    source: str = "the trace"

    @property
    def expert_weights(self) -> float:
        """Weights of a routed expert."""
        return self.expert_bytes * 8 / self.weight_bits


def _attention(*, hidden: int, heads: int, kv_heads: int, head: int, experts: int) -> float:
    """Bytes of grouped-query attention and the router, at 16 bits a weight."""
    return 2.0 * hidden * (2 * heads * head + 2 * kv_heads * head + experts)


def _card(
    name: str,
    *,
    attention_bytes: float,
    weight_bits: float = 16.0,
    shared_bytes: float = 0.0,
    source: str,
) -> ModelCard:
    preset = PRESETS[name]
    return ModelCard(
        name=name,
        layers=preset.layers,
        experts=preset.experts,
        top_k=preset.top_k,
        expert_bytes=preset.expert_bytes,
        weight_bits=weight_bits,
        attention_bytes=attention_bytes,
        shared_bytes=shared_bytes,
        source=source,
    )


_GPT_OSS = "config.json: hidden 2880, 64 heads and 8 KV heads of 64; attention BF16, experts MXFP4"

#: Sizes of known models by name. Shapes and expert sizes are those of the presets.
CARDS: dict[str, ModelCard] = {
    card.name: card
    for card in (
        _card(
            "gpt-oss-20b",
            attention_bytes=_attention(hidden=2880, heads=64, kv_heads=8, head=64, experts=32),
            weight_bits=4.25,
            source=_GPT_OSS,
        ),
        _card(
            "gpt-oss-120b",
            attention_bytes=_attention(hidden=2880, heads=64, kv_heads=8, head=64, experts=128),
            weight_bits=4.25,
            source=_GPT_OSS,
        ),
        _card(
            "qwen3-30b-a3b",
            attention_bytes=_attention(hidden=2048, heads=32, kv_heads=4, head=128, experts=128),
            source="config.json: hidden 2048, 32 heads and 4 KV heads of 128; BF16",
        ),
        _card(
            "mixtral-8x7b",
            attention_bytes=_attention(hidden=4096, heads=32, kv_heads=8, head=128, experts=8),
            source="config.json: hidden 4096, 32 heads and 8 KV heads of 128; BF16",
        ),
        _card(
            "olmoe-1b-7b",
            attention_bytes=_attention(hidden=2048, heads=16, kv_heads=16, head=128, experts=64),
            source="config.json: hidden 2048, 16 heads of 128; BF16",
        ),
        _card(
            "deepseek-v2-lite",
            # Latent attention: queries, latent keys and values, their expansion, output; router.
            attention_bytes=2.0
            * (2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 2048 * 2048 + 2048 * 64),
            shared_bytes=2.0 * 2 * 3 * 2048 * 1408,
            source="config.json: hidden 2048, 16 heads, KV rank 512, two shared experts; BF16",
        ),
        ModelCard(
            name="tinymoe",
            layers=8,
            experts=32,
            top_k=4,
            expert_bytes=36_864,
            attention_bytes=_attention(hidden=128, heads=4, kv_heads=4, head=32, experts=32),
            source="models/tinymoe/config.json: width 128, 4 heads; FP16",
        ),
    )
}


def model_card(
    trace: Trace, *, expert_bytes: int | None = None, attention_bytes: float | None = None
) -> ModelCard:
    """Sizes of the model that a trace was recorded from.

    Where the trace's shape is that of a known model, its card is taken with the trace's k.
    Otherwise the size of an expert comes from the trace or the caller.

    Parameters
    ----------
    trace : :class:`Trace`
        What the router chose.
    expert_bytes, attention_bytes : number or None
        Sizes that go before those of the card.

    Raises
    ------
    TraceError
        If nobody says how large an expert is.
    """
    model = model_config(trace)
    known = CARDS.get(model.name)
    if known is not None and (known.layers, known.experts) == (model.layers, model.experts):
        card = replace(known, top_k=model.top_k)
        recorded = trace.meta.get("expert_bytes")
        if isinstance(recorded, int) and recorded > 0 and recorded != card.expert_bytes:
            # The trace was recorded from quantized weights: the same weights, fewer bits.
            share = recorded / card.expert_bytes
            card = replace(
                card,
                expert_bytes=recorded,
                weight_bits=card.weight_bits * share,
                attention_bytes=(card.attention_bytes or 0.0) * share,
                shared_bytes=card.shared_bytes * share,
            )
    else:
        card = ModelCard(
            name=model.name,
            layers=model.layers,
            experts=model.experts,
            top_k=model.top_k,
            expert_bytes=model.expert_bytes,
        )
    if expert_bytes is not None:
        bits = card.weight_bits * expert_bytes / (card.expert_bytes or expert_bytes)
        card = replace(card, expert_bytes=expert_bytes, weight_bits=bits)
    if attention_bytes is not None:
        card = replace(card, attention_bytes=attention_bytes)
    if card.expert_bytes < 1:
        raise TraceError(
            f"Trace of model {card.name} doesn't say how large an expert is, and the model is not"
            " known: give --expert-bytes, or model.expert_bytes in the machine file"
        )
    return card
