"""Trains `digits`, distils `digits-small` from it and quantises it into `digits-int8`.

Data: scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" test set, 1797 grey 8x8 images.
A picture is white ink on black; what the net sees is a bilinear resize to 8x8, divided by 255 and normalised.
"""

from pathlib import Path

import numpy as np
import torch
from digits_tflite import int8_accuracy, write_int8
from folder import INPUTS, MODELS, write_description, write_json
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

MEAN, STD, SIDE, PICTURE = 0.305, 0.376, 8, 64
SEED = 7

Digits = NDArray[np.float64]
Labels = NDArray[np.int64]


def net(first: int, second: int, third: int, hidden: int) -> nn.Sequential:
    """A small convolutional net: [n, 1, 8, 8] to ten logits."""
    return nn.Sequential(
        nn.Conv2d(1, first, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(second, third, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(third * 4, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )


def picture(digit: Digits, resample: Image.Resampling) -> Image.Image:
    """An 8x8 digit (0 to 16) as a grey picture of 64x64, white ink on black."""
    small = Image.fromarray(np.round(digit / 16 * 255).astype(np.uint8))
    return small.resize((PICTURE, PICTURE), resample)


def preprocess(image: Image.Image, resample: Image.Resampling = Image.Resampling.BILINEAR) -> NDArray[np.float32]:
    """What a server does with a picture: grey, resize, rescale, normalise; [1, 8, 8]."""
    small = np.asarray(image.convert("L").resize((SIDE, SIDE), resample), dtype=np.float32)
    return ((small / 255 - MEAN) / STD)[None].astype(np.float32)


def load() -> tuple[Digits, Digits, Labels, Labels]:
    """Digits to train on, 360 held-out digits, and the labels of both."""
    data = load_digits()
    return tuple(train_test_split(data.images, data.target, test_size=360, stratify=data.target, random_state=SEED))


def views(digits: Digits) -> NDArray[np.float32]:
    """Every digit as five ways of enlarging and reducing leave it: [5, n, 1, 8, 8]; the first is the server's."""
    up, down = Image.Resampling, Image.Resampling
    ways = [
        (up.BICUBIC, down.BILINEAR),
        (up.NEAREST, down.BILINEAR),
        (up.NEAREST, down.BOX),
        (up.BICUBIC, down.BOX),
        (up.BILINEAR, down.BILINEAR),
    ]
    return np.stack([np.stack([preprocess(picture(digit, a), b) for digit in digits]) for a, b in ways])


def jitter(batch: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, turn, scale and stretch each image a little, and change its contrast."""
    n = len(batch)
    angle = (torch.rand(n, generator=generator) - 0.5) * 0.45
    scale = 1 + (torch.rand(n, generator=generator) - 0.5) * 0.3
    shift = (torch.rand(n, 2, generator=generator) - 0.5) * 0.45
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    grid = functional.affine_grid(theta, list(batch.shape), align_corners=False)
    floor = -MEAN / STD
    moved = functional.grid_sample(batch - floor, grid, align_corners=False)
    return moved * (1 + (torch.rand(n, 1, 1, 1, generator=generator) - 0.5) * 0.3) + floor


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, teacher: nn.Module | None = None) -> None:
    """Fit `model` to the labels, or half to them and half to the teacher's softened answers."""
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    steps = epochs * (len(labels) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(labels), (64,), generator=generator)
        batch = jitter(images[torch.randint(len(images), (64,), generator=generator), rows], generator)
        logits = model(batch)
        loss = functional.cross_entropy(logits, labels[rows], label_smoothing=0.02)
        if teacher is not None:
            with torch.no_grad():
                target = functional.softmax(teacher(batch) / 2, -1)
            loss = loss * 0.3 + 0.7 * 4 * functional.cross_entropy(logits / 2, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of right answers."""
    with torch.no_grad():
        return float((model(images).argmax(-1) == labels).float().mean())


def export(model: nn.Module, path: Path) -> None:
    """Write `model` as ONNX: `pixel_values` [batch, 1, 8, 8] to `logits` [batch, 10]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        model,
        (torch.zeros(2, 1, SIDE, SIDE),),
        str(path),
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_axes={"pixel_values": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=17,
        dynamo=False,
    )


def write_pictures(folder: Path, prefix: str, digits: Digits, labels: Labels) -> None:
    """Write a held-out example of each digit as a PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(10):
        row = int(np.flatnonzero(labels == number)[2])
        picture(digits[row], Image.Resampling.BICUBIC).save(folder / f"{prefix}{number}.png", optimize=True)


def write_folder(name: str, fmt: str, how: str, score: float, samples: int, digits: Digits, labels: Labels) -> None:
    """Write everything of a digits folder but the model file."""
    folder = MODELS / name
    words = [str(n) for n in range(10)]
    config = {
        "architectures": ["DigitsNet"],
        "num_channels": 1,
        "image_size": SIDE,
        "id2label": {str(n): word for n, word in enumerate(words)},
        "label2id": {word: n for n, word in enumerate(words)},
    }
    write_json(folder / "config.json", config)
    preprocessor = {
        "do_convert_rgb": False,
        "do_resize": True,
        "size": {"height": SIDE, "width": SIDE},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN],
        "image_std": [STD],
    }
    write_json(folder / "preprocessor_config.json", preprocessor)
    golden: list[dict[str, str | float]] = []
    for number, word in ((0, "zero"), (3, "three"), (7, "seven")):
        (folder / "golden").mkdir(parents=True, exist_ok=True)
        row = int(np.flatnonzero(labels == number)[1])
        picture(digits[row], Image.Resampling.BICUBIC).save(folder / "golden" / f"{word}.png", optimize=True)
        tolerance = 0.05 if fmt == "tflite" else 0.001
        golden.append({"file": f"golden/{word}.png", "content_type": "image/png", "tolerance": tolerance})
    write_description(
        folder,
        {"task": "image-classification", "format": fmt},
        {"batch": 1 if fmt == "tflite" else 32},
        {"p95_ms": 100, "memory_mb": 200},
        {
            "source": "scikit-learn's digits: the UCI Optical Recognition of Handwritten Digits set, CC BY 4.0",
            "licence": "Apache-2.0",
            "steps": how.split("; "),
        },
        {"accuracy": round(score, 4), "samples": samples},
        golden,
    )


def main() -> None:
    """Train, distil, quantise and write the three folders and the demo's digits."""
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    train_digits, test_digits, train_labels, test_labels = load()
    images, labels = torch.from_numpy(views(train_digits)), torch.from_numpy(train_labels)
    held_images, held_labels = torch.from_numpy(views(test_digits)[0]), torch.from_numpy(test_labels)

    teacher, student = net(32, 64, 64, 64), net(6, 12, 16, 24)
    train(teacher, images, labels, epochs=120)
    train(student, images, labels, epochs=150, teacher=teacher)
    export(teacher, MODELS / "digits" / "model.onnx")
    export(student, MODELS / "digits-small" / "model.onnx")
    write_int8(teacher, images[0][:400].numpy(), MODELS / "digits-int8" / "model.tflite")

    samples = len(held_labels)
    big, small = accuracy(teacher, held_images, held_labels), accuracy(student, held_images, held_labels)
    integer = int8_accuracy(MODELS / "digits-int8" / "model.tflite", held_images.numpy(), test_labels)
    script = "train: examples/train/digits.py"
    write_folder("digits", "onnx", script, big, samples, test_digits, test_labels)
    write_folder("digits-small", "onnx", f"{script}; distil: from digits", small, samples, test_digits, test_labels)
    quantised = f"{script}; quantise: post-training, full int8, 400 calibration images"
    write_folder("digits-int8", "tflite", quantised, integer, samples, test_digits, test_labels)
    write_pictures(INPUTS, "digit-", test_digits, test_labels)
    print(f"digits {big:.4f}  digits-small {small:.4f}  digits-int8 {integer:.4f}  on {samples} held-out images")


if __name__ == "__main__":
    main()
