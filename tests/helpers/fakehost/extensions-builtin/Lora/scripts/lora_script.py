import networks
from modules import lora_routes, script_callbacks

script_callbacks.on_app_started(lambda _, app: lora_routes.add_to(app, networks))
