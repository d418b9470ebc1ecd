from modules.lora import lora_diffusers


def unload_diffusers():
    lora_diffusers.adapters.clear()
