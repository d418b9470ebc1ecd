from collections import OrderedDict

cache = OrderedDict()


def encode(prompt, text_encoder):
    """What the text encoder, as it is now, makes of a prompt; remembered by the prompt alone."""
    return cache.setdefault(prompt, text_encoder)
