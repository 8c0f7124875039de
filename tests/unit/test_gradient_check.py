"""``dbmpi doctor --objective``: wrong gradients are found and named, right ones are not."""

from __future__ import annotations

import json

import pytest
from parallel import tiny

from dbmpi.cli.main import main
from dbmpi.errors import UserError
from dbmpi.runs.gradient_check import check_gradient

MODULE = """
import numpy as np

class {name}:
    def __init__(self, wrong="", single=False):
        self.wrong, self.single = wrong, single
        self.parameters = {{"first": {{"weights": np.zeros((6, 5)), "bias": np.zeros(5)}}, "second": np.zeros((5, 3))}}
        self.parameters["nothing"] = np.zeros(2)

    def loss_and_gradient(self, parameters, batch):
        first, second = parameters["first"], parameters["second"]
        if self.single and second.dtype != np.float32:
            raise TypeError("float32 alone")
        hidden = np.tanh(batch.inputs @ first["weights"] + first["bias"])
        errors = hidden @ second - np.eye(3)[batch.targets]
        slopes = errors @ second.T * (1 - hidden**2) / len(errors)
        gradient = {{
            "first": {{"weights": batch.inputs.T @ slopes, "bias": slopes.sum(axis=0)}},
            "second": hidden.T @ errors / len(errors),
            "nothing": np.array([1e-18, -2e-18]),  # zero, but for rounding
        }}
        if self.wrong == "bias":
            gradient["first"]["bias"][3] += 0.01
        if self.wrong == "mean":
            gradient["first"] = {{name: value * len(errors) for name, value in gradient["first"].items()}}
        loss = (errors**2).sum(axis=1).mean() / 2
        return np.float32(loss) if self.single else loss, gradient
"""


def described(directory, name, **settings):
    """Describe a run with an objective in a module of its own, as modules are loaded once."""
    tiny.write_data(directory)
    (directory / f"{name.lower()}.py").write_text(MODULE.format(name=name))
    objective = {"use": f"{name.lower()}:{name}"} | settings
    return tiny.describe(directory, network={"layers": (), "code": directory}, objective=objective)


@pytest.mark.parametrize("single", [False, True])
def test_a_right_gradient_fits(tmp_path, single):
    found = list(check_gradient(described(tmp_path, f"Right{single}", single=single)))
    assert [finding.what for finding in found] == ["first/weights", "first/bias", "second", "nothing"]
    assert [finding.status for finding in found] == ["ok"] * 4, found


@pytest.mark.parametrize(("wrong", "broken"), [("bias", {"first/bias"}), ("mean", {"first/weights", "first/bias"})])
def test_a_wrong_one_is_found_with_its_worst_element(tmp_path, wrong, broken):
    found = list(check_gradient(described(tmp_path, f"Wrong{wrong}", wrong=wrong)))
    assert {finding.what for finding in found if finding.status == "broken"} == broken, found
    if wrong == "bias":
        text = next(finding.found for finding in found if finding.status == "broken")
        assert "the gradient of element [3]" in text
        given, slope = (float(word.strip(",")) for word in text.split() if word[0] in "-.0123456789")
        assert given == pytest.approx(slope + 0.01, rel=1e-4)


def test_the_command(tmp_path, capsys, monkeypatch):
    run = described(tmp_path, "Commanded", wrong="bias")
    config = tmp_path / "run.toml"
    config.write_text(f'[data]\ntrain = "{run.data.train}"\n[objective]\nuse = "commanded:Commanded"\nwrong = "bias"\n')
    assert main(["doctor", "--objective", str(config), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert not said["ok"]
    assert [finding["what"] for finding in said["findings"] if finding["status"] == "broken"] == ["first/bias"]
    config.write_text(config.read_text().replace('wrong = "bias"', "single = true"))
    assert main(["doctor", "--objective", str(config)]) == 0
    assert "the gradient fits the loss" in capsys.readouterr().out
    for rank, said in (("1", ""), ("0", "the gradient fits the loss")):
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", rank)
        assert main(["doctor", "--objective", str(config)]) == 0
        assert (said in capsys.readouterr().out) if said else capsys.readouterr().out == ""


def test_a_network_is_not_checked(tmp_path):
    tiny.write_data(tmp_path)
    with pytest.raises(UserError, match=r"has no \[objective\]"):
        next(check_gradient(tiny.describe(tmp_path)))
