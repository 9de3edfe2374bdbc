"""Whether a request may be served at all, by what it costs: pixels of the bucket x denoising steps
x pictures.
"""

from __future__ import annotations

from preheat.buckets import Bucket
from preheat.errors import RequestError
from preheat.models.diffusion.request import ImageRequest


def check_time(request: ImageRequest, bucket: Bucket, seconds: float, timeout: float) -> None:
    """Refuse what takes longer by itself than an answer has (TorchServe's `responseTimeout`); both
    in seconds.

    Raises:
        RequestError: it does.
    """
    if seconds <= timeout:
        return
    steps = request.num_run_steps
    generated = f"{request.num_images} x {bucket} x {steps} steps"
    field = "num_images" if request.num_images > steps else "num_inference_steps"
    raise RequestError(
        f"{generated} take {seconds:.0f} s here, and an answer has {timeout:.0f} (responseTimeout)",
        field,
    )


def check_cost(
    request: ImageRequest, bucket: Bucket, *, steps: int, least_area: int, max_cost: int | None
) -> None:
    """Refuse what costs more than `max_cost` pixel-steps (`pipeline.limits.max_cost`; None: nothing
    does).

    `steps` are calls of the denoiser for one picture, which a scheduler may make more of than were
    asked for. `least_area` is that of the smallest bucket, in pixels: how much of the cost lies in
    the size.

    Raises:
        RequestError: it costs more; at fault is the factor that weighs most.
    """
    cost = bucket.volume * steps * request.num_images
    if max_cost is None or cost <= max_cost:
        return
    factors = {
        "num_inference_steps": steps,
        "num_images": request.num_images,
        "height": bucket.volume / least_area,
    }
    at_fault = max(factors, key=lambda name: factors[name])  # of equals the first
    generated = f"{request.num_images} x {bucket} x {steps} steps"
    raise RequestError(
        f"asks for too much: {generated} are {cost} pixel-steps, at most {max_cost} are allowed",
        at_fault,
    )
