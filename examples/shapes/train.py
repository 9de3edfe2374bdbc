"""Trains everything; the same command goes on where an earlier one stopped.

torchrun --standalone --nproc-per-node 2 -m examples.shapes.train FOLDER --out MODEL
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from examples.shapes import dataset, export, text, train_unet, train_vae, workers
from examples.shapes.pipeline import assemble


def main(
    folder: Annotated[Path, typer.Argument(help="where checkpoints and sample sheets go")],
    out: Annotated[Path, typer.Option(help="where the model goes, in half precision")],
) -> None:
    """Each stage is skipped when its result lies in the folder."""
    torch.set_num_threads(1)
    workers.meet()
    texts = text.train(folder / "text")
    vae = train_vae.train(folder / "vae")
    pictures = dataset.load(folder / "latents", vae, texts)
    unet = train_unet.train(folder / "unet", texts, vae, pictures)
    if workers.rank() == 0:
        found = export.export(assemble(texts, vae, unet), out)
        print(f"one, two, three objects right: {found.right}, cut off: {found.cut}")


if __name__ == "__main__":
    typer.run(main)
