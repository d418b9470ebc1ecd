import json
import re
import sys

TAG = re.compile(r"<lora:([^:>]+)(?::([-0-9.]+))?[^>]*>")


class StableDiffusionProcessing:
    """One picture to be made. Keeps the encoded prompt until its text or its LoRA tags change."""

    cached_c = [None, None]  # noqa: RUF012 - one list for all pictures, as in the hosts
    cached_uc = [None, None]  # noqa: RUF012

    def __init__(self, prompt, scripts=None, script_args=(), seed=1, steps=20):
        self.prompt, self.negative_prompt, self.styles = prompt, "", []
        self.scripts, self.script_args = scripts, script_args
        self.seed, self.steps = seed, steps
        self.extra_generation_params, self.comments = {}, {}
        self.all_prompts = self.all_seeds = None

    def comment(self, text):
        self.comments[text] = 1

    def init(self, all_prompts, all_seeds, all_subseeds):
        pass

    def close(self):
        self.sampler = None


class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    cached_hr_c = [None, None]  # noqa: RUF012
    cached_hr_uc = [None, None]  # noqa: RUF012

    def __init__(self, *args, hr_prompt="", **kwargs):
        super().__init__(*args, **kwargs)
        self.hr_prompt = hr_prompt


class Processed:
    def __init__(self, p, images, infotexts=()):
        self.images, self.infotexts = list(images), list(infotexts)
        self.prompt, self.seed = p.prompt, p.seed
        self.comments = "".join(f"{comment}\n" for comment in p.comments)


def _quoted(value):
    """As the hosts write it."""
    return json.dumps(value, ensure_ascii=False) if set(str(value)) & set(",\n:") else value


def create_infotext(p, all_prompts, all_seeds):
    more = ", ".join(f"{key}: {_quoted(value)}" for key, value in p.extra_generation_params.items())
    return f"{all_prompts[0]}\nSteps: {p.steps}, Seed: {all_seeds[0]}" + (f", {more}" if more else "")


def process_images(p):
    """A "picture" is what the model would be changed by, and by which numbers else it would be made."""
    from modules import shared

    if p.scripts is not None:
        p.scripts.before_process(p)
    p.all_prompts = [shared.prompt_styles.apply_styles_to_prompt(p.prompt, p.styles)]
    p.all_seeds = [p.seed]
    p.init(p.all_prompts, p.all_seeds, None)
    if shared.state.interrupted:
        return Processed(p, [])
    networks = sys.modules["networks"]
    picture = networks.picture([(name, float(value or 1)) for name, value in TAG.findall(p.all_prompts[0])])
    return Processed(p, [picture], [create_infotext(p, p.all_prompts, p.all_seeds)])


def encode(prompt, text_encoder):
    """What the text encoder, as it is now, makes of a prompt; remembered by the prompt alone."""
    cache = StableDiffusionProcessing.cached_c
    if cache[0] != prompt:
        cache[0], cache[1] = prompt, text_encoder
    return cache[1]
