"""The README's example runs as it stands."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs():
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    shape = (2, 5)
    names = {
        "hidden": torch.randn(*shape, 8, requires_grad=True),
        "lm_head": torch.nn.Linear(8, 11, bias=False),
        "tokens": torch.randint(11, shape),
        "old_log_probs": torch.full(shape, -2.4),
        "advantages": torch.randn(2),
        "mask": torch.ones(shape, dtype=torch.bool),
        "turns": torch.arange(5).expand(shape),
        "rows": torch.arange(2)[:, None],
    }
    exec(code, names)
    assert names["out"].loss.isfinite()
    assert names["hidden"].grad.abs().sum() > 0
    history, out = names["history"], names["out"]
    history.update(names["turns"], out.entropy, names["mask"])
    history.commit()
    lower, upper = history.bounds(names["turns"], 0.5, 2.0)
    assert lower.isfinite().all()
    assert upper.isfinite().all()
