"""Files: reading adapters header-first, writing them whole or not at all, finding them.

torch is imported only by what returns or takes tensors, so that listing is instant.
"""

from __future__ import annotations

from lib_loramerge.files.folder import LoraFolder, output_path
from lib_loramerge.files.hashes import model_hash
from lib_loramerge.files.header import Header, TensorInfo, stamp_of
from lib_loramerge.files.place import (
    check_space,
    check_target,
    free_space,
    make_folder,
    refuse_inputs,
    temporary_beside,
)
from lib_loramerge.files.read import (
    LORA_SUFFIXES,
    LoraFile,
    changed_meanwhile,
    open_file,
    read_header,
    zero_tail,
)
from lib_loramerge.files.recognise import size_text
from lib_loramerge.files.write import Written, write_again, write_file

__all__ = [
    "LORA_SUFFIXES",
    "Header",
    "LoraFile",
    "LoraFolder",
    "TensorInfo",
    "Written",
    "changed_meanwhile",
    "check_space",
    "check_target",
    "free_space",
    "make_folder",
    "model_hash",
    "open_file",
    "output_path",
    "read_header",
    "refuse_inputs",
    "size_text",
    "stamp_of",
    "temporary_beside",
    "write_again",
    "write_file",
    "zero_tail",
]
