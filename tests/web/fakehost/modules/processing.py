class StableDiffusionProcessing:
    """Keeps the encoded prompt until its text or its LoRA tags change."""

    cached_c = [None, None]  # noqa: RUF012 - one list for all pictures, as in the hosts
    cached_uc = [None, None]  # noqa: RUF012


class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    cached_hr_c = [None, None]  # noqa: RUF012
    cached_hr_uc = [None, None]  # noqa: RUF012


def encode(prompt, text_encoder):
    """What the text encoder, as it is now, makes of a prompt; remembered by the prompt alone."""
    cache = StableDiffusionProcessing.cached_c
    if cache[0] != prompt:
        cache[0], cache[1] = prompt, text_encoder
    return cache[1]
