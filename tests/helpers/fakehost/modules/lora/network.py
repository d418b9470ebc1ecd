import json
import os
import struct

from modules import sd_checkpoint, shared


def read_metadata(filename):
    try:
        with open(filename, "rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            return json.loads(file.read(size)).get("__metadata__", {})
    except (OSError, ValueError, OverflowError, struct.error):
        return {}


class NetworkOnDisk:
    def __init__(self, name, filename):
        self.name = name
        self.filename = filename
        inside = filename.startswith(shared.cmd_opts.lora_dir)
        relative = filename[len(shared.cmd_opts.lora_dir) :].lstrip("/\\").replace("\\", "/")
        self.fullname = os.path.splitext(relative)[0] if inside else name
        self.metadata = sd_checkpoint.read_metadata_from_safetensors(filename)
        self.alias = self.metadata.get("ss_output_name", name)


class Network:
    def __init__(self, name, network_on_disk, content):
        self.name = name
        self.network_on_disk = network_on_disk
        self.content = content
