import json
import os
import struct

metadata_reads = []


def read_metadata(filename):
    metadata_reads.append(filename)
    if not filename.endswith(".safetensors"):
        return {}
    try:
        with open(filename, "rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            return json.loads(file.read(size)).get("__metadata__", {})
    except (ValueError, OverflowError, struct.error):
        return {}


class NetworkOnDisk:
    def __init__(self, name, filename):
        self.name = name
        self.filename = filename
        self.mtime = os.path.getmtime(filename)
        self.metadata = read_metadata(filename)
        self.alias = self.metadata.get("ss_output_name", name)
        self.hash = self.metadata.get("sshs_model_hash", "")
        self.shorthash = self.hash[:12]
        if self.shorthash:
            import networks

            networks.available_network_hash_lookup[self.shorthash] = self
