"""Train the DiT of this folder, and the classifier that judges its pictures, on Fashion-MNIST.

    python examples/dit/train.py --minutes 8

writes ``dit.safetensors`` and ``classifier.safetensors`` (fp16) and ``training.json`` to ``--out``.
It wants a GPU: eight minutes are for an H100 or better.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.dit import fashion
from examples.dit.classifier import Classifier, frechet_distance
from examples.dit.diffusion import STEPS, add_noise, sample
from examples.dit.model import DiT
from examples.dit.weights import HERE, write


def main() -> None:
    options = arguments()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    torch.set_float32_matmul_precision("high")
    images, labels = fashion.pictures("train", options.data)
    images, labels = images.to(device), labels.to(device)
    classifier = train_classifier(images, labels, epochs=options.epochs)
    tested, truth = (t.to(device) for t in fashion.pictures("t10k", options.data))
    accuracy = float((logits(classifier, tested).argmax(1) == truth).float().mean())
    print(f"classifier: {accuracy:.4f} of the test pictures right", flush=True)
    model, log = train(images, labels, options, device)
    options.out.mkdir(parents=True, exist_ok=True)
    write(model, options.out / "dit.safetensors")
    write(classifier, options.out / "classifier.safetensors")
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "classifier_accuracy": accuracy,
        **log,
        **judge(model, classifier, tested, device),
    }
    (options.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "losses"}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for the DiT")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=6e-4, help="the highest learning rate")
    parser.add_argument("--epochs", type=int, default=12, help="for the classifier")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=fashion.FOLDER)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def train(
    images: Tensor, labels: Tensor, options: argparse.Namespace, device: torch.device
) -> tuple[DiT, dict[str, object]]:
    """Return the mean of the weights over the last steps, and what happened."""
    model = DiT().to(device)
    mean = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.0)
    step = torch.compile(noise_loss) if device.type == "cuda" else noise_loss
    start, seconds, number, losses = time.perf_counter(), 60 * options.minutes, 0, []
    while (spent := time.perf_counter() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(spent / seconds, number) * options.rate
        chosen = torch.randint(len(images), (options.batch,), device=device)
        known = labels[chosen].masked_fill(
            torch.rand(options.batch, device=device) < 0.1, model.config.classes
        )
        loss = step(model, fashion.scaled(images[chosen]), known)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            decay = min(0.9995, (number + 1) / (number + 10))
            for kept, now in zip(mean.parameters(), model.parameters(), strict=True):
                kept.lerp_(now, 1 - decay)
        number += 1
        if number % 100 == 0:
            losses.append(round(float(loss.detach()), 5))
            if number % 1000 == 0:
                print(f"step {number}, {spent:.0f} s: loss {losses[-1]}", flush=True)
    parameters = sum(p.numel() for p in model.parameters())
    return mean.eval(), {"steps": number, "parameters": parameters, "losses": losses}


def rate_at(part: float, number: int) -> float:
    """Return the part of the learning rate: rising for 500 steps, falling to 0 in the last half."""
    return min(1.0, (number + 1) / 500, 2 * (1 - part) + 1e-3)


def noise_loss(model: DiT, pictures: Tensor, labels: Tensor) -> Tensor:
    """Return the squared error of the noise at random timesteps."""
    noise = torch.randn_like(pictures)
    t = torch.randint(STEPS, (len(pictures),), device=pictures.device)
    with torch.autocast(pictures.device.type, torch.bfloat16):
        found = model(add_noise(pictures, noise, t), t, labels)
    return functional.mse_loss(found.float(), noise)


def train_classifier(images: Tensor, labels: Tensor, epochs: int, batch: int = 256) -> Classifier:
    """Return a trained classifier."""
    model = Classifier().to(images.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    steps = epochs * -(-len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), device=images.device).split(batch):
            loss = functional.cross_entropy(model(fashion.scaled(images[chosen])), labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def logits(model: Classifier, images: Tensor) -> Tensor:
    """Return logits for uint8 pictures."""
    return torch.cat([model(fashion.scaled(part)) for part in images.split(2000)])


@torch.no_grad()
def judge(
    model: DiT, classifier: Classifier, real: Tensor, device: torch.device
) -> dict[str, float]:
    """Return what the classifier says of 2,000 sampled pictures."""
    labels = torch.arange(2000, device=device) % 10
    pictures = sample(model, labels)
    found = classifier(pictures).argmax(1)
    features = torch.cat([classifier.features(fashion.scaled(p)) for p in real.split(2000)])
    return {
        "class_accuracy": float((found == labels).float().mean()),
        "frechet_distance": frechet_distance(classifier.features(pictures), features),
    }


if __name__ == "__main__":
    main()
