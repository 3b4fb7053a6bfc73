"""Train TinyMoE, a small mixture-of-experts language model, on a CPU.

The model is a decoder-only transformer whose every layer has a router and 32 SwiGLU experts, of
which 4 run for a token. Training text comes from :mod:`corpus`; the byte-pair tokenizer is learned
first, from the training split alone. PyTorch is needed here and nowhere else.

The length of training is the smaller of ``--steps`` and ``--minutes``; the learning rate follows
whichever is further on, so that a slow machine still ends with a small rate. Runs that end by
steps are repeatable on one machine with one thread count.

Examples
--------
Install the tools, fetch the text, train as the shipped weights were trained::

    pip install torch==2.13.0 numpy==2.4.6 safetensors==0.8.0
    python models/tinymoe/corpus.py --fetch --root /tmp/tinymoe-corpus
    nice -n 10 python models/tinymoe/train.py --corpus /tmp/tinymoe-corpus --out models/tinymoe

See that the whole script runs, in about a minute, without touching the shipped files::

    python models/tinymoe/train.py --corpus /tmp/tinymoe-corpus --out /tmp/tinymoe-try --steps 20
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from corpus import DOMAINS, documents
from safetensors.numpy import save_file
from tinymoe import BOS, PRETOKEN, Tokenizer, load, read_tensors
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Config", "TorchModel", "export", "train_tokenizer"]


@dataclass(frozen=True)
class Config:
    """Shape of the model; written to ``config.json``.

    Parameters
    ----------
    vocab, width, layers, heads, experts, top_k, expert_width, context : int
        Tokens in the vocabulary; residual width; layers, all with experts; attention heads;
        experts a layer; experts a token; hidden width of an expert; longest sequence in tokens.
    rope_base : float
        Base of the rotary position angles.
    norm_eps : float
        Added to the mean square in RMSNorm.
    """

    vocab: int = 1024
    width: int = 128
    layers: int = 8
    heads: int = 4
    experts: int = 32
    top_k: int = 4
    expert_width: int = 48
    context: int = 256
    rope_base: float = 10000.0
    norm_eps: float = 1e-5


def train_tokenizer(texts: list[bytes], vocab: int) -> list[tuple[int, int]]:
    """Learn byte-pair merges, most frequent pair first, ties to the smaller pair of ids.

    Parameters
    ----------
    texts : list of bytes
        Training text.
    vocab : int
        Tokens wanted: 256 bytes, one start token, the rest merges.

    Returns
    -------
    list of tuple of int
        Pairs of ids; merge ``i`` makes token ``257 + i``.
    """
    counted: Counter[bytes] = Counter()
    for text in texts:
        counted.update(PRETOKEN.findall(text))
    words = [(list(word), count) for word, count in counted.items()]
    pairs: dict[tuple[int, int], int] = defaultdict(int)
    where: dict[tuple[int, int], set[int]] = defaultdict(set)
    for index, (word, count) in enumerate(words):
        for pair in pairwise(word):
            pairs[pair] += count
            where[pair].add(index)
    merges: list[tuple[int, int]] = []
    while len(merges) < vocab - 257:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        new = 257 + len(merges)
        merges.append(best)
        for index in where.pop(best):
            word, count = words[index]
            for pair in pairwise(word):
                pairs[pair] -= count
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = [new]
                at += 1
            for pair in pairwise(word):
                pairs[pair] += count
                where[pair].add(index)
        del pairs[best]
    return merges


class GroupedLinear(torch.autograd.Function):
    """Rows sorted by expert, times that expert's matrix; float32, one product an expert.

    bfloat16 would be slower: row counts differ at every call, and oneDNN compiles a kernel a shape.
    """

    @staticmethod
    def forward(ctx, rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        """Multiply rows [N, in] by weights [E, out, in] with ``counts`` rows an expert."""
        out = rows.new_empty(rows.shape[0], weights.shape[1])
        at = 0
        for index, count in enumerate(counts):
            if count:
                torch.mm(rows[at : at + count], weights[index].t(), out=out[at : at + count])
                at += count
        ctx.save_for_backward(rows, weights)
        ctx.counts = counts
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Gradients of rows and weights."""
        rows, weights = ctx.saved_tensors
        grad = grad.contiguous()
        rows_grad = torch.empty_like(rows)
        weights_grad = torch.empty_like(weights)
        at = 0
        for index, count in enumerate(ctx.counts):
            if count:
                part = grad[at : at + count]
                torch.mm(part, weights[index], out=rows_grad[at : at + count])
                torch.mm(part.t(), rows[at : at + count], out=weights_grad[index])
                at += count
            else:
                weights_grad[index].zero_()
        return rows_grad, weights_grad, None


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """Scale ``x`` to unit root mean square along the last axis."""
    return functional.rms_norm(x, gain.shape, gain, eps)


class Layer(nn.Module):
    """Attention, then the mixture of experts, both with a residual path."""

    def __init__(self, config: Config, low: torch.dtype):
        super().__init__()
        self.config = config
        self.low = low
        c = config

        def matrix(*shape: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * scale / math.sqrt(shape[-1]))

        depth = 1.0 / math.sqrt(2 * c.layers)
        self.attention_norm = nn.Parameter(torch.ones(c.width))
        self.qkv = matrix(3 * c.width, c.width)
        self.out = matrix(c.width, c.width, scale=depth)
        self.expert_norm = nn.Parameter(torch.ones(c.width))
        self.router = matrix(c.experts, c.width, scale=0.5)
        self.gate_up = matrix(c.experts, 2 * c.expert_width, c.width)
        self.down = matrix(c.experts, c.width, c.expert_width, scale=depth)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the new residual, the load-balancing loss and the experts chosen."""
        c = self.config
        batch, length, _ = x.shape
        normed = rms_norm(x, self.attention_norm, c.norm_eps).to(self.low)
        qkv = (normed @ self.qkv.to(self.low).t()).float()
        qkv = qkv.view(batch, length, 3, c.heads, -1).permute(2, 0, 3, 1, 4)
        half = qkv.shape[-1] // 2
        q, k = (
            torch.cat((p[..., :half] * cos - p[..., half:] * sin,
                       p[..., half:] * cos + p[..., :half] * sin), -1)
            for p in (qkv[0], qkv[1])
        )  # fmt: skip
        mixed = functional.scaled_dot_product_attention(q, k, qkv[2], is_causal=True).to(self.low)
        mixed = mixed.transpose(1, 2).reshape(batch, length, c.width)
        x = x + (mixed @ self.out.to(self.low).t()).float()

        rows = rms_norm(x, self.expert_norm, c.norm_eps).view(-1, c.width)
        logits = rows @ self.router.t()
        top, chosen = logits.topk(c.top_k, dim=-1)
        weights = top.softmax(-1)
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=c.experts)
        token = order // c.top_k
        count_list = counts.tolist()
        hidden = GroupedLinear.apply(rows[token], self.gate_up, count_list)
        hidden = functional.silu(hidden[:, : c.expert_width]) * hidden[:, c.expert_width :]
        made = GroupedLinear.apply(hidden, self.down, count_list)
        made = made * weights.flatten()[order].unsqueeze(1)
        # Undoing the sort and summing over k is deterministic, unlike index_add.
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel())
        summed = made[back].view(-1, c.top_k, c.width).sum(1)
        x = x + summed.view(batch, length, c.width)

        share = counts.float() / flat.numel()
        balance = c.experts * (share * logits.softmax(-1).mean(0)).sum()
        return x, balance, chosen


class TorchModel(nn.Module):
    """TinyMoE in PyTorch.

    Parameters
    ----------
    config : Config
        Shape.
    low : torch.dtype
        Type of the matrix products; bfloat16 to train, float32 to compare with NumPy.
    """

    def __init__(self, config: Config, low: torch.dtype = torch.bfloat16):
        super().__init__()
        self.config = config
        self.low = low
        self.embedding = nn.Parameter(
            torch.randn(config.vocab, config.width) / math.sqrt(config.width)
        )
        self.layers = nn.ModuleList(Layer(config, low) for _ in range(config.layers))
        self.final_norm = nn.Parameter(torch.ones(config.width))
        half = config.width // config.heads // 2
        rate = config.rope_base ** (-torch.arange(half).float() / half)
        angle = torch.arange(config.context).float().unsqueeze(1) * rate
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [B, T, vocab], mean balance loss and experts [layers, B*T, k]."""
        length = tokens.shape[1]
        # A tied embedding serves as output matrix too, so the input is scaled up to unit size.
        x = functional.embedding(tokens, self.embedding) * math.sqrt(self.config.width)
        balances, chosen = [], []
        for layer in self.layers:
            x, balance, ids = layer(x, self.cos[:length], self.sin[:length])
            balances.append(balance)
            chosen.append(ids)
        x = rms_norm(x, self.final_norm, self.config.norm_eps).to(self.low)
        logits = x @ self.embedding.to(self.low).t()
        return logits, torch.stack(balances).mean(), torch.stack(chosen)


def export(model: TorchModel) -> dict[str, np.ndarray]:
    """Tensors as the file holds them: float16, one contiguous block an expert.

    Parameters
    ----------
    model : TorchModel
        Trained model.

    Returns
    -------
    dict of str to numpy.ndarray
        Tensors by name; the layout is in the card.
    """

    def half(x: Tensor) -> np.ndarray:
        return np.ascontiguousarray(x.detach().numpy().astype(np.float16))

    tensors = {"embedding": half(model.embedding), "final_norm": half(model.final_norm)}
    for index, layer in enumerate(model.layers):
        for name in ("attention_norm", "qkv", "out", "expert_norm", "router"):
            tensors[f"layers.{index}.{name}"] = half(getattr(layer, name))
        # gate_up already holds gate rows before up rows.
        parts = (half(layer.gate_up), half(layer.down))
        blocks = np.concatenate([p.reshape(p.shape[0], -1) for p in parts], axis=1)
        tensors[f"layers.{index}.experts"] = np.ascontiguousarray(blocks)
    return tensors


def load_exported(model: TorchModel, tensors: dict[str, np.ndarray]) -> None:
    """Copy exported tensors into ``model``: the float16 weights are what is evaluated."""
    c = model.config
    split = 2 * c.expert_width * c.width
    with torch.no_grad():
        model.embedding.copy_(torch.from_numpy(tensors["embedding"].astype(np.float32)))
        model.final_norm.copy_(torch.from_numpy(tensors["final_norm"].astype(np.float32)))
        for index, layer in enumerate(model.layers):
            for name in ("attention_norm", "qkv", "out", "expert_norm", "router"):
                value = tensors[f"layers.{index}.{name}"].astype(np.float32)
                getattr(layer, name).copy_(torch.from_numpy(value))
            blocks = torch.from_numpy(tensors[f"layers.{index}.experts"].astype(np.float32))
            layer.gate_up.copy_(blocks[:, :split].view(layer.gate_up.shape))
            layer.down.copy_(blocks[:, split:].view(layer.down.shape))


def evaluate(model: TorchModel, stream: np.ndarray, sizes: np.ndarray, limit: int) -> dict:
    """Perplexity of held-out tokens in windows of the full context, each from a cold start."""
    length = model.config.context
    loss = byte_count = token_count = 0.0
    starts = np.arange(0, min(len(stream), limit) - length, length)
    with torch.no_grad():
        for group in np.array_split(starts, math.ceil(len(starts) / 16)):
            rows = np.stack([stream[at : at + length + 1] for at in group]).astype(np.int64)
            wanted = torch.from_numpy(rows[:, 1:]).flatten()
            logits, _, _ = model(torch.from_numpy(rows[:, :-1]))
            flat = logits.view(len(wanted), -1).float()
            loss += functional.cross_entropy(flat, wanted, reduction="sum").item()
            token_count += len(wanted)
            byte_count += float(sizes[rows[:, 1:]].sum())
    return {
        "tokens": int(token_count),
        "perplexity_per_token": math.exp(loss / token_count),
        "perplexity_per_byte": math.exp(loss / byte_count),
        "bits_per_byte": loss / byte_count / math.log(2),
    }


def compare(folder: Path, stream: np.ndarray) -> tuple[float, dict]:
    """Run PyTorch in float32 and NumPy over one full context.

    Returns
    -------
    tuple of float and dict
        Largest difference of logits; PyTorch's answer to the first tokens, for the tests.
    """
    reference = load(folder)
    model = TorchModel(Config(), torch.float32)
    load_exported(model, read_tensors(folder / "tinymoe.safetensors"))
    tokens = stream[: model.config.context].astype(np.int64)
    with torch.no_grad():
        expected, _, chosen = model(torch.from_numpy(tokens)[None])
    state = reference.start()
    worst = 0.0
    for at, token in enumerate(tokens):
        logits, routing, _ = reference.step(int(token), state)
        worst = max(worst, float(np.abs(logits - expected[0, at].numpy()).max()))
        if not np.array_equal(routing, chosen[:, at].numpy()):
            print(f"routing differs at position {at}")
    first = 32
    reference_answer = {
        "tokens": tokens[:first].tolist(),
        "argmax": expected[0, :first].argmax(-1).tolist(),
        "last_logits": [round(float(x), 4) for x in expected[0, first - 1]],
    }
    return worst, reference_answer


def usage_entropy(chosen: Tensor, experts: int) -> list[float]:
    """Entropy of expert use in bits, layer by layer; log2(experts) is uniform."""
    result = []
    for ids in chosen:
        share = torch.bincount(ids.flatten(), minlength=experts).double()
        share = share / share.sum()
        result.append(float(-(share * share.clamp_min(1e-12).log2()).sum()))
    return result


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, required=True, help="folder filled by corpus.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and logs")
    parser.add_argument("--steps", type=int, default=12000, help="optimizer steps (%(default)s)")
    parser.add_argument("--minutes", type=float, default=44.0, help="wall limit (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="windows a step (%(default)s)")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak rate (%(default)s)")
    parser.add_argument("--balance", type=float, default=0.003, help="load loss (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    parser.add_argument("--seed", type=int, default=20261122, help="of everything (%(default)s)")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    # The fill would cost a pass over every buffer; nothing here reads uninitialised memory.
    torch.utils.deterministic.fill_uninitialized_memory = False
    random = np.random.default_rng(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    config = Config()

    everything = documents(options.corpus)
    path = options.out / "tokenizer.json"
    if path.exists():
        tokenizer = Tokenizer.load(path)
    else:
        print("learning the tokenizer")
        learned = train_tokenizer([d.text for d in everything if not d.held_out], config.vocab)
        tokenizer = Tokenizer(learned)
        tokenizer.save(path)
    sizes = np.array([len(tokenizer.token_bytes(i)) for i in range(config.vocab)])
    streams: dict[tuple[str, bool], np.ndarray] = {}
    for domain in DOMAINS:
        for held_out in (False, True):
            joined: list[int] = []
            for document in everything:
                if document.domain == domain and document.held_out == held_out:
                    joined.append(BOS)
                    joined.extend(tokenizer.encode(document.text))
            streams[domain, held_out] = np.array(joined, dtype=np.int16)
            print(f"{domain} {'held-out' if held_out else 'training'}: {len(joined):,} tokens")

    model = TorchModel(config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {2 * parameters / 1e6:.2f} MB as float16")
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
        lr=options.rate, betas=(0.9, 0.95), eps=1e-8, fused=True,
    )  # fmt: skip

    start = time.monotonic()
    running = balance_mean = 0.0
    log = []
    step = 0
    while step < options.steps:
        minutes = (time.monotonic() - start) / 60
        progress = max(step / options.steps, minutes / options.minutes)
        if progress >= 1:
            break
        rate = (
            options.rate * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * progress))
        )
        for group in optimizer.param_groups:
            group["lr"] = max(rate, options.rate * 0.01)
        rows = []
        for index in range(options.batch):
            stream = streams[DOMAINS[index % len(DOMAINS)], False]
            at = int(random.integers(len(stream) - config.context - 1))
            rows.append(stream[at : at + config.context + 1])
        batch = torch.from_numpy(np.stack(rows).astype(np.int64))
        logits, balance, chosen = model(batch[:, :-1])
        loss = functional.cross_entropy(
            logits.view(-1, config.vocab).float(), batch[:, 1:].reshape(-1)
        )
        (loss + options.balance * config.layers * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        running = loss.item() if step == 1 else 0.95 * running + 0.05 * loss.item()
        balance_mean = balance.item()
        if step % 20 == 0 or step == 1:
            entropy = usage_entropy(chosen, config.experts)
            done = step * options.batch * config.context
            spent = time.monotonic() - start
            print(
                f"step {step:5} loss {running:.4f} balance {balance_mean:.3f} entropy "
                f"{min(entropy):.2f}..{max(entropy):.2f} bits, {done / spent:,.0f} tokens/s, "
                f"{spent / 60:.1f} min",
                flush=True,
            )
        if step % 500 == 0:
            code, prose = (evaluate(model, streams[d, True], sizes, 16384) for d in DOMAINS)
            spent = round((time.monotonic() - start) / 60, 1)
            bits = {"code": code["bits_per_byte"], "prose": prose["bits_per_byte"]}
            log.append({"step": step, "minutes": spent, **bits})
            print(f"  held-out bits a byte: code {code['bits_per_byte']:.3f} "
                  f"prose {prose['bits_per_byte']:.3f}", flush=True)  # fmt: skip
            save_file(export(model), options.out / "partial.safetensors")

    minutes = (time.monotonic() - start) / 60
    tensors = export(model)
    save_file(tensors, options.out / "tinymoe.safetensors")
    (options.out / "partial.safetensors").unlink(missing_ok=True)
    exact = TorchModel(config, torch.float32)
    load_exported(exact, tensors)
    held_out = {d: evaluate(exact, streams[d, True], sizes, 1 << 40) for d in DOMAINS}
    (options.out / "config.json").write_text(json.dumps(asdict(config), indent=1) + "\n")
    result = {
        "steps": step, "minutes": round(minutes, 2), "parameters": parameters,
        "tokens_seen": step * options.batch * config.context,
        "training_tokens": {d: len(streams[d, False]) for d in DOMAINS},
        "batch": options.batch, "rate": options.rate, "balance": options.balance,
        "threads": options.threads, "seed": options.seed, "torch": torch.__version__,
        "held_out": held_out, "log": log,
    }  # fmt: skip
    for domain in DOMAINS:
        difference, reference = compare(options.out, streams[domain, True])
        result[f"numpy_{domain}"] = difference
    result["reference"] = reference
    (options.out / "training.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("held_out", "numpy_code", "numpy_prose")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
