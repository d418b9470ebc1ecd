"""REST of the LoRA list, and what a picture would be made with."""

from modules import call_queue
from modules.processing import TAG


def add_to(app, networks):
    """Args: networks: The module with the LoRA list."""

    @app.get("/sdapi/v1/loras")
    def loras():
        return [
            {"name": entry.name, "path": entry.filename} for entry in networks.available_networks.values()
        ]

    @app.post("/sdapi/v1/refresh-loras")
    def refresh():
        networks.list_available_networks()

    @app.get("/fake/picture")
    def picture(prompt: str):
        with call_queue.queue_lock:
            return networks.picture([(name, float(value or 1)) for name, value in TAG.findall(prompt)])
