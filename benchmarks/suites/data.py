"""What a data set of image files costs: memory, and the time until training starts.

N PNGs of 64x64 pixels, in folders of classes and in a parquet file, are loaded and a tiny network
is trained on them, each time in a process of its own: with an empty cache of ``datasets``, and
again. Images are decoded as they are needed, so memory should hardly grow with N. The peak counts
every page that is resident, also those of mapped files, which the system takes back at need.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from harness.timing import Setting
from torch import Tensor, nn

from ocm import data
from ocm.evaluation.environment import Row, environment
from ocm.evaluation.markdown import markdown_table
from ocm.training.loop import train
from ocm.training.settings import TrainingSettings

SEED = 0
_SIDE, _CLASSES = 64, 10
_MEGABYTE = 1e6


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurement.

    Attributes:
        counts: Numbers of images, of which the first is the measure for the memory of the others.
        num_steps: Steps of training.
        batch_size: Images a step.
    """

    counts: tuple[int, ...] = (600, 60_000)
    num_steps: int = 200
    batch_size: int = 64


QUICK = Sizes(counts=(60, 600), num_steps=20)


def run(setting: Setting) -> tuple[Row, str]:
    """Return the record of the suite and its tables."""
    sizes = QUICK if setting.quick else Sizes()
    rows: list[Row] = []
    for count in sizes.counts:
        with TemporaryDirectory() as directory:
            folder, file = Path(directory) / "images", Path(directory) / "images.parquet"
            write_images(folder, count, SEED)
            write_parquet(folder, file)
            for source, path in (("folder", folder), ("parquet", file)):
                for cache in ("empty", "filled"):
                    found = measured(path, Path(directory) / f"cache-{source}", sizes)
                    rows.append({"source": source, "num_images": count, "cache": cache, **found})
    record: Row = {
        "suite": "data",
        "seeds": SEED,
        "sizes": {"num_steps": sizes.num_steps, "batch_size": sizes.batch_size},
        "environment": environment(torch.device("cpu")),
        "rows": rows,
        "growth": growth(rows),
    }
    return record, report(record)


def write_images(folder: Path, count: int, seed: int) -> None:
    """Write ``count`` PNGs of 64x64 pixels, smooth noise in colour, in folders of ten classes."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    for label in range(_CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
    for index in range(count):
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
        image.save(folder / f"class{index % _CLASSES}" / f"{index}.png", compress_level=1)


def write_parquet(folder: Path, file: Path) -> None:
    """Write the images of a folder into one parquet file, 1000 at a time."""
    import pyarrow
    import pyarrow.parquet

    images = sorted(folder.glob("*/*.png"))
    schema = pyarrow.schema({"image": pyarrow.binary(), "label": pyarrow.int64()})
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        for first in range(0, len(images), 1000):
            part = images[first : first + 1000]
            columns = {
                "image": [image.read_bytes() for image in part],
                "label": [int(image.parent.name.removeprefix("class")) for image in part],
            }
            writer.write_table(pyarrow.table(columns, schema))


def measured(path: Path, cache: Path, sizes: Sizes) -> Row:
    """Load and train in a new process, and return what it measured."""
    code = "import sys; from suites.data import _child; _child(*sys.argv[1:])"
    arguments = [str(path), str(cache), str(sizes.num_steps), str(sizes.batch_size)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    started = time.time()
    answer = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if answer.returncode:
        raise RuntimeError(f"training on {path} failed:\n{answer.stderr}")
    found = json.loads(answer.stdout.splitlines()[-1])
    return {
        "seconds_to_first_step": found.pop("first_step") - started,
        **found,
    }


def _child(path: str, cache: str, num_steps: str, batch_size: str) -> None:
    """Load and train, and print when the first step ended and how much memory it took."""
    ended: list[float] = []

    def loss(
        module: nn.Module, x0: Tensor, t: Tensor, rows: Mapping[str, Tensor], sample_offset: int
    ) -> Tensor:
        value: Tensor = (module(x0) - x0).square().mean()
        if not ended:
            ended.extend((time.time(), time.process_time()))
        return value

    images = data.load(path, cache_dir=cache)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 1))
    settings = TrainingSettings(int(num_steps), int(batch_size), seed=SEED)
    labels = {} if images.train_labels is None else {"labels": images.train_labels}
    train("network", network, loss, images.train, labels, 1, settings, device="cpu", progress=False)
    first_step, cpu_seconds = ended
    print(
        json.dumps({"first_step": first_step, "cpu_seconds_to_first_step": cpu_seconds, **memory()})
    )


def memory() -> Row:
    """Return the peak of this process's resident memory, and its parts now, in megabytes.

    As Linux tells them: getrusage would count the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {name: rest for name, _, rest in (line.partition(":") for line in lines)}

    def megabytes(name: str) -> float:
        return int(kilobytes[name].split()[0]) * 1024 / _MEGABYTE

    return {
        "peak_megabytes": megabytes("VmHWM"),
        "own_megabytes": megabytes("RssAnon"),
        "mapped_megabytes": megabytes("RssFile"),
    }


def growth(rows: list[Row]) -> list[Row]:
    """Return how much higher the peaks are than those of the fewest images."""
    fewest = min(row["num_images"] for row in rows)
    base = {
        (row["source"], row["cache"]): row["peak_megabytes"]
        for row in rows
        if row["num_images"] == fewest
    }
    return [
        {
            "source": row["source"],
            "cache": row["cache"],
            "num_images": row["num_images"],
            "fewest": fewest,
            "megabytes": row["peak_megabytes"] - base[row["source"], row["cache"]],
        }
        for row in rows
        if row["num_images"] != fewest
    ]


def report(record: Row) -> str:
    """Return the tables of a record."""
    columns = {
        "source": "",
        "num_images": ",d",
        "cache": "",
        "peak_megabytes": ".0f",
        "own_megabytes": ".0f",
        "mapped_megabytes": ".0f",
        "seconds_to_first_step": ".1f",
        "cpu_seconds_to_first_step": ".1f",
    }
    sizes = record["sizes"]
    grown = [
        f"{row['megabytes']:.0f} MB ({row['source']}, cache {row['cache']})"
        for row in record["growth"]
    ]
    return "\n\n".join(
        [
            f"Loading N images of 64x64 pixels and training {sizes['num_steps']} steps of "
            f"{sizes['batch_size']}: the peak of resident memory, its parts at the end, and the "
            "time from the start of the process",
            markdown_table(record["rows"], columns),
            f"Growth of the peak over {record['growth'][0]['fewest']:,} images: "
            f"{', '.join(grown)}.",
        ]
    )
