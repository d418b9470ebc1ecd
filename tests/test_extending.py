"""docs/EXTENDING.md is true: one of each kind is added to a copy of the package and works everywhere.

What is added here is what the page shows; a test of its own compares.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "EXTENDING.md"

# File of the package to what is added at its end, or makes it up; for `put`, what goes where.
METHOD = '''

@merge_method(
    "doubled",
    label="Twice the sum",
    summary="Twice the exact weighted sum.",
    linear=True,
    formula="2 sum_i w_i delta_i",
)
def doubled(deltas: Sequence[Delta], weights: Sequence[float], context: LayerContext) -> Delta:
    """Twice the exact sum."""
    return svd(deltas, [2 * weight for weight in weights], context)
'''

ADAPTER = '''"""Half LoRA: a low-rank product that counts half."""

from __future__ import annotations

from ..delta import LowRank
from .kinds import AdapterKind, Layer, LayerFacts, Shape, Shapes, matrix, register, require, split_kernel


def _describe(shapes: Shapes, where: str, kernel: Shape | None) -> LayerFacts:
    out, rank = matrix(shapes["half_up"], "half_up", where)
    rows, in_, stored = split_kernel(shapes["half_down"], "half_down", where, kernel)
    require(rank == rows, where, shapes, "half_up", "half_down")
    return LayerFacts("half", out, in_, stored, rank)


def _build(layer: Layer) -> LowRank:
    up, down = layer.slots["half_up"].flatten(1), layer.slots["half_down"].flatten(1)
    return LowRank(up, down, down.shape[0] / 2, layer.facts.kernel)


HALF = register(
    AdapterKind(
        name="half",
        label="Half LoRA",
        forms=(frozenset({"half_up", "half_down"}),),
        family="half",
        endings={"half_up": ("half_up.weight",), "half_down": ("half_down.weight",)},
        needs_base=False,
        exact_low_rank=True,
        keys="`half_up` `half_down`",
        does="Merged as half of its product.",
        source="this page",
        describe=_describe,
        build=_build,
    )
)
'''

MODEL = '''

RECORDS += (
    Architecture(
        "towers",
        "Towers",
        "towers",
        "towers-1",
        words=("towers",),
        text_encoders=SAME,
        names=parse_table("""
[towers.{4} > tower_blocks.{}]
attn.qkv 3h,h > attn.to_q + attn.to_k + attn.to_v
mlp.0 4h,h > ff.net.0
"""),
        sizes=(Size("", {"h": 24}),),
        spelling=COMFY,
        blocks="BASE IN towers:T OUT",
    ),
)
'''

DIALECT = """
DIALECTS["towertool"] = Dialect(
    "towertool", "Tower Tool", re.compile(r"(?P<part>tt~)(?P<path>[^:]+)"), {"tt~": "unet"},
    "tt~towers.0.mlp.0.half_up.weight",
)  # fmt: skip
"""

HOST = '''"""Tower UI, as its own code loads LoRAs."""

from __future__ import annotations

from ._base import COMFY, Host, some

HOST = Host("towerui", "Tower UI", "1.0", "0123abcd", some("towers"), {COMFY: some("towers")}, {})
'''

SETTING = """    comment: str | None = setting(
        None,
        lambda value: check_text("comment", value, LONGEST_NAME),
        "a remark that the merged file keeps",
        metavar="TEXT",
        commands=("merge",),
    )
"""

WORD = """DIALECTS["towerfile"] = "Tower Tool"
"""

WRITTEN = """

def _towers(architecture_id: str, layer: str) -> Parts:
    names = _comfy(architecture_id, layer)
    return tuple((name.replace("diffusion_model.", "tt~"), rows) for name, rows in names)


WRITTEN["towerfile"] = Written(PEFT_STYLE, _towers)
"""

ROUTE = """    @route("GET", "/kinds", "Kinds of adapters that can be merged")
    def kinds(self, _: Fields) -> Any:
        from ..adapters import ADAPTERS

        return {"kinds": [kind.label for kind in ADAPTERS.values()]}

"""

APPENDED = {
    "methods/linear.py": METHOD,
    "models/image.py": MODEL,
    "dialects/registry.py": DIALECT,
    "dialects/output.py": WRITTEN,
}
# File to what is put before which of its lines.
INSERTED = (
    ("recipe/model.py", SETTING, "    skip_unsupported: bool = setting("),
    ("recipe/model.py", WORD, "_FIRST = ("),
    ("webui/routes.py", ROUTE, "    def _queue(self"),
)
NEW = {"adapters/half.py": ADAPTER, "hosts/towerui.py": HOST}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the package and of what the tables are made with, with one more of each."""
    folder = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lib_loramerge", folder / "lib_loramerge", ignore=ignore)
    (folder / "tests" / "helpers").mkdir(parents=True)
    for name in ("readme_tables.py", "facts.py"):
        shutil.copy(ROOT / "tests" / "helpers" / name, folder / "tests" / "helpers")
    package = folder / "lib_loramerge"
    for name, text in NEW.items():
        (package / name).write_text(text, encoding="utf-8")
    for name, text in APPENDED.items():
        (package / name).write_text((package / name).read_text(encoding="utf-8") + text, encoding="utf-8")
    for name, added, before in INSERTED:
        text = (package / name).read_text(encoding="utf-8")
        assert text.count(before) == 1
        (package / name).write_text(text.replace(before, added + before), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def lora(copy: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {
        "tt~towers.0.mlp.0.half_up.weight": torch.randn(96, 2, generator=generator),
        "tt~towers.0.mlp.0.half_down.weight": torch.randn(2, 24, generator=generator),
        "tt~tower_blocks.3.attn.to_k.half_up.weight": torch.randn(24, 2, generator=generator),
        "tt~tower_blocks.3.attn.to_k.half_down.weight": torch.randn(2, 24, generator=generator),
    }
    save_file(tensors, copy / "a.safetensors")
    return tensors


def product(tensors: dict[str, torch.Tensor], up: str, down: str) -> torch.Tensor:
    return tensors[f"{up}.weight"].double() @ tensors[f"{down}.weight"].double()


def run(copy: Path, *words: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(copy), "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=copy, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_of_them_work_on_the_command_line_in_plan_and_inspect(copy, lora):
    merge = ["-m", "lib_loramerge", "merge", "a.safetensors", "-o", "out.safetensors", "--mode", "doubled"]
    merge += [
        "--for",
        "towerui",
        "--comment",
        "of two towers",
        "--rank",
        "full",
        "--dtype",
        "float32",
        "--json",
    ]
    plan = json.loads(run(copy, *merge, "--dry-run"))
    assert plan["base_model"] == "Towers"
    assert not (copy / "out.safetensors").exists()
    report = json.loads(run(copy, *merge))
    assert report["base_model"] == "Towers"
    result = load_file(copy / "out.safetensors")
    layers = {key.rpartition(".lora_")[0] for key in result}
    assert layers == {"diffusion_model.towers.0.mlp.0", "diffusion_model.towers.3.attn.qkv"}
    change = product(result, "diffusion_model.towers.0.mlp.0.lora_B", "diffusion_model.towers.0.mlp.0.lora_A")
    once = product(lora, "tt~towers.0.mlp.0.half_up", "tt~towers.0.mlp.0.half_down")
    # Twice a half of it.
    assert torch.linalg.norm(change - once) < 1e-6 * torch.linalg.norm(once)
    looked = json.loads(run(copy, "-m", "lib_loramerge", "inspect", "out.safetensors", "--json"))
    assert looked["base_model"] == "Towers"
    assert "Tower UI" in looked["hosts"]
    with safe_open(copy / "out.safetensors", "pt") as file:
        assert '"comment": "of two towers"' in json.dumps(file.metadata()).replace('\\"', '"').replace(
            '":"', '": "'
        )
    first = json.loads(run(copy, "-m", "lib_loramerge", "inspect", "a.safetensors", "--json"))
    assert (first["dialect"], first["kinds"]) == ("towertool", {"half": 2})
    assert "doubled" in run(copy, "-m", "lib_loramerge", "methods")
    assert "--comment TEXT" in run(copy, "-m", "lib_loramerge", "merge", "--help")


def test_the_written_spelling_is_chosen_by_its_word_and_read_again(copy, lora):
    run(
        copy,
        "-m",
        "lib_loramerge",
        "convert",
        "a.safetensors",
        "-o",
        "t.safetensors",
        "--dialect",
        "towerfile",
    )
    with safe_open(copy / "t.safetensors", "pt") as file:
        assert "tt~towers.0.mlp.0.lora_A.weight" in file.keys()  # noqa: SIM118
    looked = json.loads(run(copy, "-m", "lib_loramerge", "inspect", "t.safetensors", "--json"))
    assert (looked["base_model"], looked["dialect"]) == ("Towers", "towertool")


def test_the_route_is_served_and_has_its_schema(copy):
    code = (
        "from lib_loramerge.webui.fields import Fields\n"
        "from lib_loramerge.webui.routes import ROUTES, Service\n"
        "route = next(route for route in ROUTES if route.path == '/kinds')\n"
        "print(route.method, route.name, route.answer(Service(None, None), Fields({}, route.fields)))"
    )
    said = run(copy, "-c", code)
    assert said.startswith("GET kinds ")
    assert "Half LoRA" in said


def test_the_tables_of_readme_and_docs_have_them(copy):
    code = (
        "from tests.helpers import facts, readme_tables as t\n"
        "print(t.kinds_table(), t.models_text(), t.methods_table(), facts.formats_page())"
    )
    tables = run(copy, "-c", code)
    for word in ("Half LoRA", "Towers", "Tower Tool", "`doubled`"):
        assert word in tables


@pytest.mark.parametrize("text", [METHOD, ADAPTER, MODEL, DIALECT, WORD, WRITTEN, HOST, SETTING, ROUTE])
def test_the_page_shows_what_is_added_here(text):
    assert text.strip() in PAGE.read_text(encoding="utf-8")
