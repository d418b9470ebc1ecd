import argparse
import os

from modules import paths_internal

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir", default=paths_internal.data_path)
parser.add_argument("--models-dir", default=paths_internal.models_path)
parser.add_argument(
    "--lora-dir", type=os.path.abspath, default=os.path.join(paths_internal.models_path, "Lora")
)
parser.add_argument(
    "--lyco-dir-backcompat", type=os.path.abspath, default=os.path.join(paths_internal.models_path, "LyCORIS")
)
parser.add_argument("--ckpt-dir", type=os.path.abspath, default=None)
parser.add_argument("--extension", action="append", default=[])
parser.add_argument("--forge", action="store_true")
parser.add_argument("--sdnext", action="store_true")
parser.add_argument("--options", default="{}", help="JSON of settings that the user has changed")
parser.add_argument("--port", type=int, default=0)
parser.add_argument("--subpath", default=None)
parser.add_argument("--api", action="store_true")
parser.add_argument("--api-auth", default=None)
parser.add_argument("--nowebui", action="store_true")
parser.add_argument("--gradio-auth", default=None)
parser.add_argument("--gradio-allowed-path", action="append", default=[paths_internal.data_path])
parser.add_argument("--no-gradio-queue", action="store_true")
parser.add_argument("--listen", action="store_true")
parser.add_argument("--share", action="store_true")
parser.add_argument("--server-name", default=None)
parser.add_argument("--enable-insecure-extension-access", action="store_true")
parser.add_argument("--hide-ui-dir-config", action="store_true")
parser.add_argument("--freeze-settings", action="store_true")
parser.add_argument("--theme", default=None)
# SD.Next's, which has REST switched on always.
parser.add_argument("--auth", default=None)
parser.add_argument("--auth-file", default=None)
parser.add_argument("--freeze", action="store_true")
# Forge Neo's further folders of LoRAs.
parser.add_argument("--lora-dirs", action="append", default=[])

cmd_opts = parser.parse_args()
cmd_opts.api = cmd_opts.api or cmd_opts.sdnext
cmd_opts.webui_is_non_local = any([cmd_opts.share, cmd_opts.listen, cmd_opts.server_name])
cmd_opts.disable_extension_access = (
    cmd_opts.webui_is_non_local and not cmd_opts.enable_insecure_extension_access
)
