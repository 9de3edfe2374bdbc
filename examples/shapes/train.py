"""Trains everything; the same command goes on where an earlier one stopped.

torchrun --standalone --nproc-per-node 2 -m examples.shapes.train FOLDER
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from examples.shapes import dataset, text, train_unet, train_vae, workers


def main(
    folder: Annotated[Path, typer.Argument(help="where checkpoints and sample sheets go")],
) -> None:
    """Each stage is skipped when its result lies in the folder."""
    torch.set_num_threads(1)
    workers.meet()
    texts = text.train(folder / "text")
    vae = train_vae.train(folder / "vae")
    pictures = dataset.load(folder / "latents", vae, texts)
    train_unet.train(folder / "unet", texts, vae, pictures)


if __name__ == "__main__":
    typer.run(main)
