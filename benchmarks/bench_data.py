"""Training images a second: 32 x 32 from memory in batches, and JPEGs of ImageNet's size from disk one by one.

Small: an epoch of 20,000 images, random crop with padding 4 and flip, in shuffled batches of float32, normalised; this
trainer's batched augmentation beside torchvision's per-image pipelines. Their pixels are noise, which costs what
photographs cost: nothing is decoded. Large: what a worker does for an image of 500 x 375, in one process, beside
torchvision's pipeline on PIL images. Writes `bench_data.csv`, `bench_data.md` and `bench_jpeg.md` to
`benchmarks/results/`; `--quick` takes fewer images and rounds, and writes to `runs/bench_quick/`.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import harness
import numpy as np
import torch
from harness import Provider, duration, ratio, table
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms as v1
from torchvision.datasets import CIFAR100
from torchvision.transforms import v2

# `train` is part of the checkout and never installed; an installed sortkd_kernels goes before the checkout's.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import sortkd_kernels as sk
from train.data import ArrayData, ArrayLoader, BatchPlan
from train.data.folder import Listing
from train.data.sources import CIFAR_MEAN, CIFAR_STD
from train.data.stream import Images

ROOT = Path(__file__).resolve().parents[1]
RESULTS, QUICK_RESULTS = ROOT / "benchmarks" / "results", ROOT / "runs" / "bench_quick"
WORKERS, TARGET, JPEG_TARGET = 2, 20, 1.5
BATCHED, TORCHVISION, TORCHVISION_V2, ROOF = "batched", "torchvision", "torchvision v2", "roof"


@dataclass(frozen=True)
class Row:
    """One provider at one batch size: a line of the CSV. Ratios are of medians of the same rounds.

    `cpu_us_per_image` is the processor time of a whole pass, workers included: what is left to compare where other
    programs want the cores too, of which two workers then get more than one process does.
    """

    batch_size: int
    provider: str
    images: int
    images_per_s: float
    images_per_s_q1: float
    images_per_s_q3: float
    runs: int
    cpu_us_per_image: float
    gb_per_s: float
    this_over_torchvision: float
    roof_over_this: float


def per_image(data: ArrayData, transform: Callable[..., Tensor], batch_size: int, persistent: bool) -> DataLoader:
    """torchvision's own data set class on these pixels, in `WORKERS` processes, that outlive the epoch or do not."""
    dataset = CIFAR100.__new__(CIFAR100)  # without its constructor, which wants the files
    dataset.data, dataset.targets = data.images.numpy(), data.labels.tolist()
    dataset.transform, dataset.target_transform = transform, None
    return DataLoader(dataset, batch_size, shuffle=True, num_workers=WORKERS, persistent_workers=persistent)


def epoch(batches: Iterable[tuple[Tensor, ...]], device: torch.device) -> Callable[[], Tensor]:
    """A pass over the batches. Its result: the channels' first two moments, of a few images of every eighth batch."""

    def call() -> Tensor:
        total = torch.zeros(2, 3, device=device)
        for i, (images, *_) in enumerate(batches):
            images = images.to(device)
            if i % 8 == 0:  # enough to know wrong images by, and little of the time
                sample = images[:8]
                total += torch.stack([sample.mean((0, 2, 3)), sample.square().mean((0, 2, 3))])
        return total / (i // 8 + 1)

    return call


def copy(data: ArrayData, batch_size: int, device: torch.device) -> Callable[[], Tensor]:
    """The roof: the same bytes read and written, in order, and nothing done to them."""
    batches = data.images.to(device).split(batch_size)

    def call() -> Tensor:
        for batch in batches:
            images = batch.float()
        return images

    return call


def cpu_seconds(call: Callable[[], Tensor]) -> float:
    """Processor time of a call and of the processes that it started and ended."""

    def used() -> float:
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + ended.ru_utime + ended.ru_stime

    before = used()
    call()
    return used() - before


def providers(data: ArrayData, batch_size: int, device: torch.device, *, persistent: bool) -> list[Provider]:
    """All of them on the same data."""
    classic = v1.Compose(
        [v1.RandomCrop(32, padding=4), v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(CIFAR_MEAN, CIFAR_STD)]
    )
    tensors = v2.Compose(
        [v2.ToImage(), v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(),
         v2.ToDtype(torch.float32, scale=True), v2.Normalize(CIFAR_MEAN, CIFAR_STD)]
    )  # fmt: skip
    samples = len(data.labels)
    batched = ArrayLoader(
        data, BatchPlan(samples, batch_size, shuffle=True, seed=0), device=device, padding=4, flip=True
    )
    nbytes = samples * 3072 * (1 + 4)

    def check(result: Tensor) -> None:
        """The channels' first two moments are those of noise with the border of zeros that a random crop has."""
        inside = (1 - 20 / 9 / 32) ** 2  # a crop is 20/9 pixels off on average, in each direction
        mean, std = (torch.tensor(x, dtype=torch.float64)[:, None] for x in (CIFAR_MEAN, CIFAR_STD))
        values = (torch.arange(256) / 255 - mean) / std
        expected = [inside * (values**k).mean(1) + (1 - inside) * values[:, 0] ** k for k in (1, 2)]
        torch.testing.assert_close(result.double().cpu(), torch.stack(expected), rtol=0.02, atol=0.02)

    def provider(name: str, call: Callable[[], Tensor], checked: bool = True) -> Provider:
        return Provider(name, call, nbytes=nbytes, check=check if checked else None)

    return [
        provider(BATCHED, epoch(batched, device)),
        provider(TORCHVISION, epoch(per_image(data, classic, batch_size, persistent), device)),
        provider(TORCHVISION_V2, epoch(per_image(data, tensors, batch_size, persistent), device)),
        provider(ROOF, copy(data, batch_size, device), checked=False),
    ]


def rows_of(data: ArrayData, batch_size: int, device: torch.device, rounds: int) -> list[Row]:
    """Every provider checked, then timed in turn."""
    cpu = {}
    for p in providers(data, batch_size, device, persistent=False):
        result = p.run()
        if p.check:
            p.check(result)
        cpu[p.name] = min(cpu_seconds(p.call) for _ in range(3))
    all_of_them = providers(data, batch_size, device, persistent=True)
    times = {name: phases["both"] for name, phases in harness.measure(all_of_them, 0, device, rounds).items()}
    samples = len(data.labels)
    return [
        Row(
            batch_size, p.name, samples, *(samples / getattr(times[p.name], x) for x in ("median", "q3", "q1")),
            times[p.name].runs, 1e6 * cpu[p.name] / samples, p.nbytes / times[p.name].median / 1e9,
            times[TORCHVISION].median / times[p.name].median, times[p.name].median / times[ROOF].median,
        )
        for p in all_of_them
    ]  # fmt: skip


def markdown(rows: list[Row], facts: dict[str, str]) -> str:
    """The table, and the target."""
    lines = [
        [str(r.batch_size), r.provider, f"{r.images_per_s:,.0f}",
         f"{r.images_per_s_q1:,.0f} to {r.images_per_s_q3:,.0f}", duration(r.cpu_us_per_image), f"{r.gb_per_s:.2f}",
         ratio(r.this_over_torchvision), ratio(r.roof_over_this)]
        for r in rows
    ]  # fmt: skip
    verdicts = [
        f"- batch {r.batch_size}: {r.this_over_torchvision:.0f} times torchvision's pipeline with {WORKERS} workers, "
        f"target at least {TARGET}: {'pass' if r.this_over_torchvision >= TARGET else '**missed**'}"
        for r in rows
        if r.provider == BATCHED
    ]
    heads = ["batch", "", "images/s", "quartiles", "CPU time an image", "GB/s", f"/ {TORCHVISION}", f"{ROOF} / this"]
    return "\n".join(
        ["# Augmented 32 x 32 images a second", "", *(f"- {k}: {v}" for k, v in facts.items()), "",
         f"Medians over whole epochs, providers in turn. `{TORCHVISION}`: CIFAR100 and its transforms on PIL images, "
         f"`{TORCHVISION_V2}`: v2 transforms on tensors, each in a DataLoader of {WORKERS} workers that were started "
         f"before the clock; `{BATCHED}`: this trainer's loader, in the training process; `{ROOF}`: uint8 to float32, "
         "in order, no augmentation. CPU time is of all processes, their start included. Each was checked by the "
         "moments of its channels before it was timed.", "",
         *table(heads, lines), "", *verdicts, "",
         "A batch of 256 is 3 MB, which the C library may fetch as fresh pages every time: that alone can take longer "
         "than the augmentation.", ""]
    )  # fmt: skip


def write_jpegs(folder: Path, count: int) -> None:
    """Made photographs of ImageNet's usual size: noise with their spectrum, 1/f, in as many bytes, 110 KB."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        height, width = ((375, 500), (333, 500), (500, 375))[number % 3]
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
        frequency[0, 0] = 1
        spectrum = np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency**1.1
        pixels = np.fft.irfft2(spectrum, s=(height, width))
        pixels = 120 + 50 * (pixels - pixels.mean()) / pixels.std()
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))
        image.save(folder / f"{number}.jpg", quality=92)


def jpeg_table(folder: Path, rounds: int, facts: dict[str, str]) -> str:
    """Decode, crop, resize, flip: images a second of processor time, of this trainer's worker and of torchvision's."""
    listing = Listing(folder)
    steps = {
        "training": (True, v2.Compose([v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()])),
        "evaluation": (False, v2.Compose([v2.Resize(256), v2.CenterCrop(224)])),
    }
    lines, verdicts = [], []
    for name, (train, transform) in steps.items():
        images = Images(listing, train=train)

        def on_pil(index: int, seed: int, transform: v2.Compose = transform) -> Tensor:
            with Image.open(listing.path(index)) as image:
                image = image.convert("RGB")
            torch.default_generator.manual_seed(seed)
            return torch.from_numpy(np.array(transform(image)))

        def ours(index: int, seed: int, images: Images = images) -> Tensor:
            return images[index, seed]

        for index in range(len(listing)):
            # The two round a resize's weights in other places. A wrong crop of such noise is off by dozens.
            off = (ours(index, index).int() - on_pil(index, index).int()).abs().max().item()
            assert off <= 1, f"{name}, image {index}: off by {off} levels of 255"
        seconds: dict[str, list[float]] = {"ours": [], "PIL": []}
        for number in range(rounds):
            for provider, call in (("ours", ours), ("PIL", on_pil)):
                start = time.process_time()
                for index in range(len(listing)):
                    call(index, number)
                seconds[provider].append((time.process_time() - start) / len(listing))
        ratios = [pil / own for pil, own in zip(seconds["PIL"], seconds["ours"], strict=True)]
        q1, median, q3 = statistics.quantiles(ratios, n=4)
        rates = [f"{1 / statistics.median(seconds[provider]):,.0f}" for provider in ("ours", "PIL")]
        lines.append([name, *rates, f"{ratio(median)} ({ratio(q1)} to {ratio(q3)})"])
        passed = "pass" if median >= JPEG_TARGET else "**missed**"
        verdicts.append(f"- {name}: {ratio(median)} times PIL's, target at least {JPEG_TARGET}: {passed}")
    return "\n".join(
        ["# JPEGs of ImageNet's size a second and core", "", *(f"- {k}: {v}" for k, v in facts.items()), "",
         f"{len(listing)} made JPEGs of 500 x 375 pixels, some 115 KB each; one thread, processor time, both in turn: "
         f"medians of {rounds} rounds, and the median and quartiles of the rounds' ratios. PIL: torchvision's v2 "
         "transforms on PIL images. Before the clock every image was compared: at most one level of 255 apart, which "
         "is how far the two resizes round apart; the decoded pixels are the same.", "",
         *table(["", "ours, images/s", "PIL, images/s", "ours / PIL"], lines), "", *verdicts, ""]
    )  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10,000 images, 3 rounds; files go to runs/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="folder of the results")
    parser.add_argument("--only", choices=("small", "jpeg"), help="one half of the benchmark")
    args = parser.parse_args()
    device = torch.device(args.device)
    output = args.output or (QUICK_RESULTS if args.quick else RESULTS)
    output.mkdir(parents=True, exist_ok=True)
    facts = harness.machine(device, sk.build_info())
    if args.only != "small":
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker
        with tempfile.TemporaryDirectory() as folder:
            write_jpegs(Path(folder) / "all", 12 if args.quick else 60)
            text = jpeg_table(Path(folder), 5 if args.quick else 21, facts)
        torch.set_num_threads(threads)
        (output / "bench_jpeg.md").write_text(text)
        print(text)
    if args.only == "jpeg":
        return
    samples = 10_000 if args.quick else 20_000
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (samples, 32, 32, 3), dtype=torch.uint8, generator=generator)
    data = ArrayData(images, torch.randint(100, (samples,), generator=generator), CIFAR_MEAN, CIFAR_STD)
    rows: list[Row] = []
    for batch_size in (64,) if args.quick else (64, 256):
        rows += rows_of(data, batch_size, device, rounds=3 if args.quick else 7)
    harness.write_csv(output / "bench_data.csv", Row, rows)
    text = markdown(rows, facts)
    (output / "bench_data.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
