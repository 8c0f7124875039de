"""A user's own layer: found, checked, tried, stored, and never loaded because a file names it."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from unit.checkpoint_files import make_info
from unit.test_evaluate import make_data

from dbmpi import config
from dbmpi.checkpoint.directory import checkpoint_path
from dbmpi.checkpoint.writer import CheckpointWriter
from dbmpi.cli.main import main
from dbmpi.errors import UserError
from dbmpi.network.description import Network
from dbmpi.network.own import from_directory, from_files, make
from dbmpi.replica import placement
from dbmpi.replica.plan import plan_exchanges
from dbmpi.replica.tensors import tensor_parts
from dbmpi.replica.trial import try_layer

FLOAT = np.dtype(np.float32)

# One weight and one output for each input; %s stand for what tests change.
SCALE = """
from dbmpi.index.layout import Tensor
from dbmpi.index.boxes import Box


class Scale:
    def __init__(self, name, input_shape, factor=1.0, notes=()):
        self.name, self.input_shape, self.factor = name, input_shape, factor
        self.output_shape = input_shape
        self.tensors = {"weights": Tensor(f"{name}/weights", input_shape)}

    def input_box(self, output):
        return output

    def tensor_box(self, tensor, output):
        return output

    def flops(self, output, samples, *, input_gradient=True):
        return 3 * output.size * samples

    def initial(self, tensor, out, seed, number, start):
        out[:] = 1

    def forward(self, task):
        parameters, inputs, outputs = task.parameters, task.inputs, task.outputs
        outputs[:] = self.factor * parameters["weights"][..., None] * inputs

    def backward(self, task):
        parameters, parameter_gradient, input_gradient = task.parameters, task.parameter_gradient, task.input_gradient
        inputs, gradient = task.inputs, task.gradient
        parameter_gradient["weights"][:] = self.factor * (gradient * inputs).sum(axis=-1)
        if input_gradient is not None:
            input_gradient[:] = self.factor * parameters["weights"][..., None] * gradient
"""


@pytest.fixture
def own(tmp_path, request):
    """Write a module of a name that no other test uses; it is forgotten, and the path restored, afterwards."""
    path, names = list(sys.path), []

    def write(text=SCALE, folder=tmp_path):
        name = f"scale_{abs(hash(request.node.name))}_{len(names)}"
        names.append(name)
        (folder / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return name

    yield write
    sys.path[:] = path
    for name in names:
        sys.modules.pop(name, None)


def section(kind, **settings):
    return config.NetworkSection.model_validate({"layers": [{"type": kind, **settings}, {"type": "dense", "units": 2}]})


def refused(make, *words):
    with pytest.raises(UserError) as caught:
        make()
    for word in words:
        assert word in str(caught.value), caught.value
    return str(caught.value)


def test_a_class_beside_the_configuration(tmp_path, own):
    name = own()
    (tmp_path / "config.toml").write_text(
        f'[data]\ntrain = "x.h5"\n[[network.layers]]\ntype = "{name}:Scale"\nfactor = 2.5\nnotes = ["a", {{b = 1}}]\n'
        '[[network.layers]]\ntype = "dense"\nunits = 2\n'
    )
    run = config.load(tmp_path / "config.toml")
    assert name not in sys.modules  # a description is only text
    assert run.network.layer_names == ("scale1", "dense2")
    assert run.network.code == tmp_path
    assert config.Run.from_json(run.to_json()) == run
    assert config.Run.from_json(run.to_json()).network.layers[0].settings == {"factor": 2.5, "notes": ["a", {"b": 1}]}
    network = Network(run.network, (3,), 1, load=from_directory(run.network.code))
    assert [layer.name for layer in network.own_layers] == ["scale1"]
    assert network.layout.tensors[0].name == "scale1/weights"
    try_layer(network.layers[0], FLOAT)
    moved = config.load(tmp_path / "config.toml", ("network.code=elsewhere",))
    assert moved.network.code == Path("elsewhere")


@pytest.mark.parametrize("setting", ["input_shape = 3", '"a b" = 1', "day = 2026-01-01", "much = inf", "list = [nan]"])
def test_settings_that_cannot_be_stored_are_refused(tmp_path, setting):
    (tmp_path / "config.toml").write_text(
        f'[data]\ntrain = "x.h5"\n[[network.layers]]\ntype = "m:C"\n{setting}\n[[network.layers]]\nunits = 2\n'
    )
    refused(lambda: config.load(tmp_path / "config.toml"), "network.layers.0", "expected")


@pytest.mark.parametrize("kind", ["m:", ":C", "../m:C", "m:C:D", "m:C()"])
def test_types_that_name_no_class(kind):
    with pytest.raises(ValueError, match="pattern"):
        section(kind)


def test_where_modules_are_looked_for(tmp_path, own):
    kind = f"{own()}:Scale"
    message = refused(lambda: Network(section("absent_module:Scale"), (3,), 1, load=from_directory(tmp_path)))
    assert f"{tmp_path} has no absent_module.py" in message
    refused(lambda: Network(section(kind), (3,), 1, load=from_directory(None)), "Python finds no module")
    sys.path.append(str(tmp_path))
    Network(section(kind), (3,), 1, load=from_directory(None))
    words = ("network.code", "absent", "expected the directory of somewhere.py")
    refused(lambda: Network(section("somewhere:A"), (3,), 1, load=from_directory(tmp_path / "absent")), *words)
    (tmp_path / "json.py").write_text("")
    refused(lambda: Network(section("json:Scale"), (3,), 1, load=from_directory(tmp_path)), "another module 'json'")
    (tmp_path / f"{kind[:-6]}_package").mkdir()
    (tmp_path / f"{kind[:-6]}_package" / "__init__.py").write_text("")
    (tmp_path / f"{kind[:-6]}_package" / "part.py").write_text(SCALE)
    packaged = section(f"{kind[:-6]}_package.part:Scale")
    assert Network(packaged, (3,), 1, load=from_directory(tmp_path)).size == 3 + 8


BROKEN = {
    "no class": (lambda text: "Scale = 3", ("not a class but a int",)),
    "another name": (lambda text: text.replace("Scale", "Other"), ("defines no 'Scale'",)),
    "no Python": (lambda text: "def", ("cannot be loaded: SyntaxError", "line 1")),
    "what it imports is missing": (lambda text: "import nothing_like_this", ("No module named 'nothing_like_this'",)),
    "it ends Python": (lambda text: "import sys\nsys.exit()", ("SystemExit", "line 2")),
    "a property fails": (lambda text: text.replace("self.output_shape = input_shape", "pass")
                         + "\n    @property\n    def output_shape(self):\n        return self.shap\n",
                         ("asked for its shapes", "no attribute 'shap'", ".py, line")),
    "it fails": (lambda text: "x = 1\n1 / 0", ("ZeroDivisionError", "line 2")),
    "a method is missing": (lambda text: text.replace("flops", "flop"), ("is no layer: it has no flops",)),
    "a method takes less": (lambda text: text.replace("backward(self, task)", "backward(self)"), (".backward takes",)),
    "its name": (lambda text: text.replace("self.name,", "self.nam,"), ("it has no name",)),
    "its shape": (lambda text: text.replace("output_shape = input_shape", "output_shape = [2]"), ("is [2] for",)),
    "its tensors": (lambda text: text.replace("{name}/weights", "weights"), ("Tensor('own/weights', shape)",)),
    "its constructor": (lambda text: text.replace("= name, input", "= nam, input"), ("NameError", "nam", ".py, line")),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_layer_is_refused(own, tmp_path, case):
    change, words = BROKEN[case]
    described = section(f"{own(change(SCALE))}:Scale", name="own")
    refused(lambda: Network(described, (3,), 1, load=from_directory(tmp_path)), "layer 'own'", *words)


def test_settings_that_the_class_does_not_take(own, tmp_path):
    described = section(f"{own()}:Scale", factr=2)
    words = ("layer 'scale1'", "'factr'", "factor=1.0")
    refused(lambda: Network(described, (3,), 1, load=from_directory(tmp_path)), *words)


FORWARD = 'outputs[:] = self.factor * parameters["weights"][..., None] * inputs'

WRONG = {
    "inputs beyond": ("return output\n", "return Box((0, 0), (9, 9))\n", ("[0:9, 0:9]", "(4, 5)")),
    "no box": ("return output\n", "return None\n", ("input_box returns NoneType", "expected a Box")),
    "no box of a tensor": ("tensor, output):\n        return output", "tensor, output):\n        return 3",
                           ("tensor_box returns int for 'weights'", "expected a Box")),
    "no operations": ("return 3 * output.size * samples", "pass", ("flops returns NoneType", "expected a number")),
    "ends Python": (FORWARD, "raise SystemExit", ("forward is called", "SystemExit")),
    "other axes": ("return output\n", "return Box((0,), (1,))\n", ("[0:1]", "(4, 5)")),
    "tensor beyond": ("tensor, output):\n        return output", "tensor, output):\n        return Box((0, 0), (9, 9))",
                      ("the part [0:9, 0:9] of 'weights'", "(4, 5)")),
    "tensor too small": ("tensor, output):\n        return output",
                         "tensor, output):\n        return Box((0, 0), (1, 1))", ("[0:1, 0:1]", "(4, 5)", "all of it")),
    "wrong shape": (FORWARD,
                    "outputs[:] = inputs[..., :2]", ("forward", "(2, 2, 3)")),
    "returns another shape": (FORWARD,
                              "return inputs.sum(axis=0)",
                              ("forward returns float32 (2, 3)", "'outputs', float32 (2, 2, 3)")),
    "returns another dtype": (FORWARD,
                              "return inputs.astype('float64')", ("float64 (2, 2, 3)", "float32 (2, 2, 3)")),
    "copies a part": (FORWARD, 'outputs.reshape(-1, 3)[:] = 0\n\n    takes_parts = True', ("'outputs'", "unwritten")),
    "writes a part": (FORWARD, "outputs[:1] = inputs[:1]", ("forward leaves 6 of the 12 values of 'outputs'",)),
    "no gradient": ("input_gradient[:] =", "x =", ("backward leaves 12 of the 12 values of 'input_gradient'",)),
    "no parameter gradient": ('parameter_gradient["weights"][:] =', "x =", ("parameter_gradient['weights']",)),
    "needs the input gradient": ("if input_gradient is not None:", "if True:", ("backward is called", "NoneType")),
    "changes inputs": ("outputs[:] = self", "inputs[:] = 3\n        outputs[:] = self", ("changes its inputs",)),
    "depends on the cut": ("outputs[:] = self", "outputs[:] = task.output.size * self",
                           ("outputs must not depend on how they are cut", "[0:1, 0:1]")),
    "initial values by the part": ("out[:] = 1", "out[:] = range(len(out))", ("initial values of 'weights'",)),
    "no initial values": ("out[:] = 1", "pass", ("initial('weights') leaves 16 of the 16 values",)),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_a_layer_computes_is_tried(own, tmp_path, case):
    right, wrong, words = WRONG[case]
    assert right in SCALE
    described = config.OwnLayer(type=f"{own(SCALE.replace(right, wrong))}:Scale")
    layer = make(described, "own", (4, 5), from_directory(tmp_path))
    refused(lambda: try_layer(layer, FLOAT), "layer 'own'", *words)


def test_a_kernel_that_does_not_compile_is_told_with_the_line_that_calls_it(own, tmp_path):
    """And not with one of Numba's."""
    kernel = "\nfrom numba import njit\n\n\n@njit\ndef fill(outputs):\n    outputs[:] = 'a'\n"
    name = own(SCALE.replace(FORWARD, "fill(outputs)") + kernel)
    layer = make(config.OwnLayer(type=f"{name}:Scale"), "own", (4, 5), from_directory(tmp_path))
    line = 1 + (tmp_path / f"{name}.py").read_text().splitlines().index("        fill(outputs)")
    told = refused(lambda: try_layer(layer, FLOAT), "layer 'own'", "TypingError", "outputs[:] = 'a'")
    assert told.endswith(f"{name}.py, line {line})")


PART = """
    def forward_part(self, task, part):
        places = part.slices(task.output)
        task.outputs[places] = self.factor * task.parameters["weights"][places][..., None] * task.inputs[places]
"""


@pytest.mark.parametrize("method", ["input_box", "tensor_box"])
def test_what_fails_only_for_some_boxes_is_told_with_its_line(own, tmp_path, method):
    """The trial sees a few boxes; placing the layer and planning its exchange ask for others."""
    head = next(line for line in SCALE.splitlines(keepends=True) if f"def {method}(" in line)
    failing = f"{head}        if output.starts[0] == 3:\n            raise IndexError('no such place')\n"
    name = own(SCALE.replace(head, failing))
    network = Network(section(f"{name}:Scale"), (6,), 1, load=from_directory(tmp_path))
    try_layer(network.layers[0], FLOAT)

    def plan():
        placed = placement.automatic(network.layers, 2)
        plan_exchanges(network.layers, placed)
        tensor_parts(network.layers, placed)

    refused(
        plan, "layer 'scale1' fails when asked what its outputs [3", "IndexError: no such place", f"{name}.py, line "
    )


def test_parts_of_a_forward_pass_are_tried(own, tmp_path):
    right = make(config.OwnLayer(type=f"{own(SCALE + PART)}:Scale"), "own", (2, 4, 5), from_directory(tmp_path))
    try_layer(right, FLOAT)
    wrong = SCALE + PART.replace("= self.factor *", "= 2 *")
    layer = make(config.OwnLayer(type=f"{own(wrong)}:Scale"), "own", (2, 4, 5), from_directory(tmp_path))
    refused(lambda: try_layer(layer, FLOAT), "layer 'own'", "forward_part", "(2, 2, 2, 3)")


def test_what_a_checkpoint_names_is_loaded_only_if_allowed(own, tmp_path, capsys, monkeypatch):
    """Neither from the directory that it names, nor from where Python finds modules."""
    name = own("from pathlib import Path\nPath(__file__).with_suffix('.loaded').touch()\n" + SCALE)
    loaded = tmp_path / f"{name}.loaded"
    described = section(f"{name}:Scale").model_copy(update={"code": tmp_path})
    layout = Network(section("any:C", name="scale1"), (3,), 1, load=lambda kind, layer: stand_in()).layout
    stored = json.dumps({"network": json.loads(described.model_dump_json())})
    with CheckpointWriter(checkpoint_path(tmp_path / "run", 1), layout) as writer:
        writer.write("parameters", 0, np.ones(layout.size, np.float32))
        writer.commit(make_info(configuration=stored, input_shape=(3,), classes=2, step=1))
    make_data(tmp_path / "data.h5", shape=(3,), classes=2)
    sys.path.append(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.py").write_text(SCALE)
    run, data = str(tmp_path / "run"), str(tmp_path / "data.h5")
    for words in (["evaluate", run, "--data", data], ["predict", run, "--data", data, "--out", "out.h5"]):
        assert main(words) == 2
        message = capsys.readouterr().err
        assert "layer 'scale1'" in message
        assert f"--allow-code {name}.py" in message
        assert main([*words, "--allow-code", "other.py"]) == 2
        assert "allow only code in other.py" in capsys.readouterr().err
        assert main([*words, "--allow-code", f"missing/{name}.py"]) == 2
        assert "no such file" in capsys.readouterr().err
        assert not loaded.exists()
    assert main(["inspect", run]) == 0
    assert f"{name}:Scale" in capsys.readouterr().out
    assert not loaded.exists()
    assert main(["evaluate", run, "--data", data, "--allow-code", str(tmp_path / f"{name}.py"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] > 0
    assert loaded.exists()


def stand_in():
    """The class of the module, made without loading one."""
    names = {}
    exec(SCALE, names)
    return names["Scale"]


def test_a_file_that_is_allowed_is_the_one_that_is_loaded(own, tmp_path):
    (tmp_path / "second").mkdir()
    name = own()
    (tmp_path / "second" / f"{name}.py").write_text(SCALE.replace("factor=1.0", "factor=4.0"))
    second = [tmp_path / "second" / f"{name}.py"]
    assert Network(section(f"{name}:Scale"), (3,), 1, load=from_files(second)).layers[0].factor == 4
    first = [tmp_path / f"{name}.py"]
    refused(lambda: Network(section(f"{name}:Scale"), (3,), 1, load=from_files(first)), "another module")
