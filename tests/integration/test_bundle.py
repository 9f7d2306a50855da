"""What a finished adapter is to those who load it: PEFT by the card's own lines, and vLLM by its rules (0.33)."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from graft_worker.protocol import ExitCode
from graft_worker.training.publish import write_card
from tests.factories import make_prepared_split, make_tiny_base
from tests.training_runs import a_request, run_trainer

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Settings of PEFT that vLLM refuses to serve, with the values that mean "not used".
UNUSED = {
    "modules_to_save": (None, []),
    "use_dora": (False,),
    "lora_bias": (False,),
    "bias": ("none",),
    "init_lora_weights": (True, False),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None,),
    "use_bdlora": (None,),
    "use_qalora": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def bundle(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    rows = [[5 + (row * 7 + position) % 40 for position in range(12)] for row in range(16)]
    spec = {"name": "a bot\nof ours", "lora": {"r": 12}, "training": {"max_steps": 2}}
    request = a_request(base, make_prepared_split(folder / "train.safetensors", rows), spec=spec, target_modules=ALL)
    assert run_trainer(folder, request).code == ExitCode.DONE
    return folder / "adapter"


def snippet(bundle: Path, language: str) -> str:
    card = (bundle / "README.md").read_text()
    (found,) = re.findall(rf"```{language}\n(.*?)```", card, flags=re.DOTALL)
    return str(found)


def test_the_config_uses_nothing_that_vllm_does_not_serve(bundle: Path) -> None:
    config = json.loads((bundle / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    for setting, unused in UNUSED.items():
        assert config.get(setting, unused[0]) in unused, setting
    assert set(config["target_modules"]) == set(ALL), "names of modules, and no pattern"


def test_every_tensor_has_a_name_that_vllm_can_place(bundle: Path) -> None:
    rank = json.loads((bundle / "adapter_config.json").read_text())["r"]
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    with safe_open(bundle / "adapter_model.safetensors", framework="pt") as weights:
        for name in weights.keys():  # noqa: SIM118 (a safetensors file is no mapping)
            found = re.fullmatch(r"base_model\.model\.(model\.layers\.\d+\.\w+\.(\w+))\.lora_(A|B)\.weight", name)
            assert found is not None and found[2] in ALL, name
            pairs.setdefault(found[1], {})[found[3]] = tuple(weights.get_slice(name).get_shape())
    assert pairs
    for module, pair in pairs.items():
        assert pair["A"][0] == pair["B"][1] == rank, module


def test_the_cards_command_lets_vllm_serve_it(bundle: Path) -> None:
    words = shlex.split(snippet(bundle, "sh"))
    assert words[:3] == ["vllm", "serve", "path/to/graft/tiny"]
    most = int(words[words.index("--max-lora-rank") + 1])
    assert most in VLLM_RANKS and most >= 12
    assert words[words.index("--lora-modules") + 1] == "ftjob-test=."
    assert "--enable-lora" in words


@pytest.mark.parametrize("is_chat", [False, True])
def test_the_cards_lines_load_it_with_peft_and_ask_it_as_it_was_taught_whatever_its_folder_is_called(
    bundle: Path, base: Path, tmp_path: Path, is_chat: bool
) -> None:
    folder = shutil.copytree(bundle, tmp_path / "of our own")
    if is_chat:
        (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
        write_card(a_request(base, base, is_chat=True), folder, {}, {})
    assert ("apply_chat_template(" in snippet(folder, "python")) == is_chat
    (folder / "path" / "to" / "graft").mkdir(parents=True)
    (folder / "path" / "to" / "graft" / "tiny").symlink_to(base)
    lines = snippet(bundle, "python") + "print(type(model).__name__, len(answer[0]) > len(asked['input_ids'][0]))\n"
    done = subprocess.run([sys.executable, "-c", lines], cwd=folder, capture_output=True, text=True, check=False)
    *generated, loaded = done.stdout.splitlines()
    assert loaded == "PeftModelForCausalLM True", done.stderr
    assert "".join(generated).startswith("Hello"), done.stdout


def test_a_base_of_the_hub_is_loaded_by_its_name_and_revision(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    write_card(a_request(tmp_path, tmp_path, base_revision=commit), tmp_path, {}, {})
    assert f'from_pretrained("graft/tiny", revision="{commit}"' in snippet(tmp_path, "python")
    assert f"vllm serve graft/tiny --revision {commit} " in snippet(tmp_path, "sh")
    card = (tmp_path / "README.md").read_text()
    assert "registered" not in card


def test_a_name_of_several_lines_stays_a_heading(bundle: Path) -> None:
    assert "\n# a bot of ours\n" in (bundle / "README.md").read_text()
