"""Attention-based multiple-instance learning (Ilse et al. 2018) on bags of a run.

    python docs/examples/attention_mil.py OUT [--slides 40] [--epochs 30]

A cohort of one seed is embedded (weight-free, on a CPU) and learned from, one of another seed is the test.
"""

import argparse
from pathlib import Path

import torch
from generated_cohort import write_cohort
from torch import nn

from slide2vec import BagDataset, ExecutionOptions, Model, Pipeline, PreprocessingConfig

options = argparse.ArgumentParser()
options.add_argument("out", type=Path)
options.add_argument("--slides", type=int, default=40)
options.add_argument("--epochs", type=int, default=30)
args = options.parse_args()

tiles = PreprocessingConfig(requested_spacing_um=0.5, requested_tile_size_px=64)
model = Model.from_preset("scattering", device="cpu", allow_non_recommended_settings=True)
bags = {}
for part, seed in (("train", 1), ("test", 2)):
    labels = write_cohort(args.out / part, args.slides, seed)
    Pipeline(model, tiles, ExecutionOptions(output_dir=args.out / f"{part}-run")).run(manifest_path=labels)
    bags[part] = BagDataset(args.out / f"{part}-run", labels)


class AttentionMIL(nn.Module):
    """(N, D) features of a slide -> a logit, and (N,) attention weights that add up to 1."""

    def __init__(self, dim: int, hidden: int = 64) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.ReLU())
        self.attend = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        self.classify = nn.Linear(hidden, 1)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.embed(features)
        weights = self.attend(hidden)[:, 0].softmax(0)
        return self.classify(weights @ hidden)[0], weights


torch.manual_seed(0)
everything = torch.cat([bag["features"] for bag in bags["train"]])
mean, scale = everything.mean(0), everything.std(0) + 1e-6
mil = AttentionMIL(everything.shape[1])
optimizer = torch.optim.AdamW(mil.parameters(), lr=1e-3, weight_decay=1e-2)
for _ in range(args.epochs):
    for index in torch.randperm(len(bags["train"])).tolist():
        bag = bags["train"][index]
        logit, _ = mil((bag["features"] - mean) / scale)
        loss = nn.functional.binary_cross_entropy_with_logits(logit, bag["label"].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

with torch.inference_mode():
    scores = torch.stack([mil((bag["features"] - mean) / scale)[0] for bag in bags["test"]])
right = bags["test"].targets == 1
auc = (scores[right][:, None] > scores[~right]).float().mean().item()
accuracy = ((scores > 0) == right).float().mean().item()
print(f"held-out seed: AUC {auc:.2f} accuracy {accuracy:.2f} of {len(scores)} slides (chance: 0.50)")
