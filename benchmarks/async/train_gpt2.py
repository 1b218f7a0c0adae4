"""Train a small model of GPT-2's architecture once, from text at hand: GPT-2's own weights need a hub.

With a hub nothing of this is needed: `model.source = "gpt2"` in a recipe takes the published weights unchanged. Here
the text is Dolly's contexts and answers (Wikipedia-like; not WikiText), the tokenizer a byte-level BPE of it, and the
result an ordinary transformers folder, by default runs/gpt2-small, with what it was made from in `provenance.json`.
Measured at the end: held-out rows and, as a recipe would, WikiText-2's test part before any fine-tuning. `--steps 0`
measures the model that is in `--out`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hocket import evaluate
from hocket.data import collate, encode, load
from hocket.provenance import git_hash

END = "<|endoftext|>"


def texts(path: Path) -> list[str]:
    """Contexts and answers, each once."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    found = [row.get(key, "") for row in rows for key in ("context", "response", "output")]
    return list(dict.fromkeys(t.strip() for t in found if t.strip()))


def measure(folder: Path, source: Path, length: int) -> dict[str, float]:
    """Loss a token, and perplexities a token and a word, on the paragraphs of a text file."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = load(source)
    examples, _, _ = encode(rows, tokenizer, max_length=length)
    pad = lambda batch: collate(batch, tokenizer.pad_token_id)
    words = sum(len(t.split()) for t in rows["text"])
    found = evaluate.evaluate(model, tokenizer, examples, pad, batch_size=32, words=words)
    return {k: found[k] for k in ("loss", "perplexity", "word_perplexity", "tokens")}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data", type=Path, default=Path("data/dolly15k/dolly15k.jsonl.gz"))
    options.add_argument("--test", type=Path, default=Path("data/wikitext2/wiki.test.raw"))
    options.add_argument("--out", type=Path, default=Path("runs/gpt2-small"))
    options.add_argument("--steps", type=int, default=2500)
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--vocabulary", type=int, default=4096)
    options.add_argument("--width", type=int, default=128)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--lr", type=float, default=2e-3)
    o = options.parse_args()
    facts = train(o) if o.steps else json.loads((o.out / "provenance.json").read_text())
    print(f"held-out loss {facts['heldout_loss']:.3f} (perplexity {math.exp(facts['heldout_loss']):.1f})", flush=True)
    if o.test.is_file():
        facts["test"] = {"source": o.test.name, "length": o.length, **measure(o.out, o.test, o.length)}
        print(f"{o.test.name}, not fine-tuned: {facts['test']}")
    (o.out / "provenance.json").write_text(json.dumps(facts, indent=1) + "\n")


def train(o: argparse.Namespace) -> dict[str, Any]:
    """Train and save as `o` says; what was done."""
    torch.manual_seed(0)
    corpus = texts(o.data)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(corpus, vocab_size=o.vocabulary, special_tokens=[END], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END, pad_token=END)
    ids = torch.tensor([t for x in bpe.encode_batch(corpus) for t in (*x.ids, tokenizer.eos_token_id)])
    rows = ids[: len(ids) // o.length * o.length].view(-1, o.length)
    held, rows = rows[::50], rows[torch.arange(len(rows)) % 50 != 0]
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=256, n_embd=o.width, n_layer=o.layers, n_head=o.width // 32,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(corpus)} texts, {len(ids)} tokens, {size / 1e6:.2f} M parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), o.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    warm = lambda s: min(1.0, (s + 1) / 100) * 0.5 * (1 + math.cos(math.pi * s / o.steps))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, warm)
    began, order = time.monotonic(), torch.randperm(o.steps * o.batch) % len(rows)
    for step in range(o.steps):
        batch = rows[order[step * o.batch : (step + 1) * o.batch]]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        if step % 100 == 0:
            print(f"step {step}: loss {float(loss.detach()):.3f}, {time.monotonic() - began:.0f} s", flush=True)
    model.eval()
    with torch.no_grad():
        total = sum(float(model(input_ids=b, labels=b).loss) * len(b) for b in held.split(16)) / len(held)
    model.save_pretrained(o.out)
    tokenizer.save_pretrained(o.out)
    return {
        "data": o.data.name, "steps": o.steps, "tokens_seen": o.steps * o.batch * o.length, "parameters": size,
        "heldout_loss": total, "seconds": time.monotonic() - began, "git": git_hash(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
