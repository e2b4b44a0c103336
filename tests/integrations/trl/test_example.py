"""The example script and the code of docs/trl.md, as their reader would run them."""

import re
import runpy
from pathlib import Path

from datasets import Dataset

from tests.integrations.trl.pairs import length_reward

SCRIPT = Path(__file__).parents[3] / "examples" / "trl_epo.py"


def test_the_example_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = runpy.run_path(str(SCRIPT))["main"]()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert rewards[-1] > 1.5 * rewards[0]
    assert trainer.history.means()[0] > 0


def test_the_pages_code_runs(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (SCRIPT.parents[1] / "docs" / "trl.md").read_text()
    code = re.search(r"```python[^\n]*\n(.*?)```", page, re.DOTALL).group(1)
    small = '"runs/epo", use_cpu=True, max_completion_length=32,'
    code = code.replace("Qwen/Qwen2.5-0.5B-Instruct", folder).replace('"runs/epo",', small)
    names = {"my_reward": length_reward, "my_prompts": Dataset.from_dict({"prompt": ["ab"]})}
    exec(code, names)
    assert names["trainer"].state.global_step == 3
    assert len(names["trainer"].history) == 3
