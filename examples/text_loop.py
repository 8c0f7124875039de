"""Train a small transformer to predict the next character of a text, in plain PyTorch.

Run it with ``python text_loop.py FILE``; without a file it learns from the source of Python's argparse.
``text_downpour.py`` is the same by Downpour.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

CONTEXT, WIDTH, HEADS, BLOCKS, BATCH = 64, 64, 4, 2, 32


class Transformer(nn.Module):
    """Scores each next character by up to 64 characters before it."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        block = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, BLOCKS, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.score = nn.Linear(WIDTH, characters)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Return scores (texts, length, characters) for texts (texts, length)."""
        length = text.shape[1]
        later = nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.token(text) + self.position(torch.arange(length))
        return self.score(self.blocks(hidden, mask=later, is_causal=True))


def loss_of(model: nn.Module, text: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of a character in the pieces of a text from `starts` on."""
    pieces = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    return nn.functional.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


def continued(model: nn.Module, text: torch.Tensor, length: int) -> torch.Tensor:
    """Return a text with so many more characters, drawn by their scores."""
    for _ in range(length):
        chances = model(text[None, -CONTEXT:])[0, -1].softmax(0)
        text = torch.cat([text, torch.multinomial(chances, 1)])
    return text


def main() -> None:
    """Train on nine tenths of the text, and print the loss of the rest and a text by the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path, nargs="?", default=argparse.__file__)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    characters = arguments.text.read_text(encoding="utf-8")
    known = sorted(set(characters))
    text = torch.tensor([known.index(one) for one in characters])
    learned, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    model = Transformer(len(known))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002)
    for step in range(arguments.steps):
        loss = loss_of(model, learned, torch.randint(len(learned) - CONTEXT, (BATCH,)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    with torch.no_grad():
        loss = loss_of(model, held_out, torch.arange(0, len(held_out) - CONTEXT, CONTEXT))
        print("".join(known[one] for one in continued(model, held_out[:CONTEXT], 200)))
    print(f"loss of the rest {loss.item():.3f}")


if __name__ == "__main__":
    main()
