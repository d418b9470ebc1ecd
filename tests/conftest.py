"""Quick tests: ``pytest -m quick`` runs these files and imports no others. Random numbers are seeded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# Together they take two cores less than 45 seconds.
QUICK = {
    "test_adapters_lora", "test_adapters_rules", "test_base_models",
    "test_blocks_layers", "test_blocks_models", "test_blocks_weights", "test_delta_core",
    "test_delta_dense", "test_delta_measure", "test_delta_storing", "test_delta_types",
    "test_dialects_parse", "test_dialects_registry", "test_docs",
    "test_files_folder", "test_files_header", "test_files_read", "test_hosts", "test_imports",
    "test_localization", "test_merge_together",
    "test_merge_vectors", "test_metadata", "test_methods_elementwise", "test_methods_linear",
    "test_methods_spherical", "test_models_blocks",
    "test_models_checkpoints", "test_models_detect", "test_presets_files",
    "test_ranks_rules", "test_ranks_size", "test_readme_tables", "test_recipe_model",
    "test_recipe_text", "test_simple_merge",
}  # fmt: skip


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave everything else out where only quick tests are asked for: importing it takes longest."""
    if config.option.markexpr != "quick":
        return None
    other_file = collection_path.name.startswith("test_") and collection_path.stem not in QUICK
    other_folder = collection_path.parent == Path(__file__).parent and collection_path.is_dir()
    return True if other_file or other_folder else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in QUICK:
            item.add_marker(pytest.mark.quick)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """A test that fails can be run again; torch is not imported for it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
