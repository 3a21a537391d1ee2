"""What a model computes of t alone, taken out of it: traced, and cut down to what the layers that carry t need."""

import copy
import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from tdq_utils.denoiser.call import time_argument
from tdq_utils.errors import TDQError


class TimeGraph:
    """The part of a model's call that leads from t to the outputs of its linear layers, as long as no sample comes in.

    A layer carries t if its output is a vector a row that depends on the time step of the call and not on the sample: no name
    decides. (Tokens of a text, which t modulates, are no vector.) Nothing of the sample's size is computed: tracing knows shapes
    alone. The graph serves calls with tensors of the same shapes.

    Attributes:
        layers: names of those that carry t, in the order in which they run. blocks: those that lead to no other of them.
        alone: those that depend on no other argument of the call, either.

    TDQError: the model cannot be traced, or no layer carries t.
    """

    def __init__(self, model: nn.Module, call: tuple[Any, Any, dict[str, Any]]):
        tensors = [*model.parameters(), *model.buffers()]
        # A copy, with the same tensors: models keep what they have computed (rotary embeddings), and here that is no values.
        model = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        linears = {name: layer for name, layer in model.named_modules() if type(layer) is nn.Linear}
        graph, ran = _traced(model, linears, call)
        found = dict(zip(ran, graph.graph.output_node().args[0], strict=True))
        kinds = ["weights"] * len(linears)
        for kind, tree in zip(("sample", "t", "condition"), call, strict=True):
            kinds += [kind] * len(tree_leaves(tree))
        needs, comes_by = _origins(graph.graph, kinds, found)
        carries = lambda node: "t" in needs[node] and "sample" not in needs[node] and node.meta["val"].dim() == 2  # noqa: E731
        outs = {name: node for name, node in found.items() if carries(node)}
        if not outs:
            raise TDQError(f"A model must have linear layers that carry t; {type(model).__name__} has none.")
        self.layers = list(outs)
        passed = set().union(*(comes_by[node] for node in outs.values()))
        self.blocks = [name for name in outs if name not in passed]
        self.alone = [name for name, node in outs.items() if "condition" not in needs[node]]
        self._linears, self._nodes = list(linears), {node.name: name for name, node in outs.items()}
        self._own = {name: layer.weight.detach() for name, layer in linears.items() if name not in outs}
        _cut(graph, list(outs.values()))
        self._graph = graph

    def run(self, weights: dict[str, Tensor], call: tuple[Any, Any, dict[str, Any]],
            given: dict[str, Tensor] | None = None) -> dict[str, Tensor]:  # fmt: skip
        """Outputs of the layers, by name, with these ``weights``; differentiable. ``given``: outputs to go on from."""
        inputs = [{f"{name}.weight": (self._own | weights)[name] for name in self._linears}, *call]
        given = {node: given[name] for node, name in self._nodes.items() if given and name in given}
        found = _Replay(self._graph, given).run(*tree_leaves(inputs), enable_io_processing=False)
        return dict(zip(self.layers, found, strict=True))


class _Replay(fx.Interpreter):
    """Runs a graph in which the values of some nodes are given."""

    def __init__(self, graph, given):
        super().__init__(graph)
        self.given = given

    def run_node(self, n):
        return self.given[n.name] if n.name in self.given else super().run_node(n)


def _traced(model, linears, call):
    ran: list[str] = []
    first, time = next(iter(inspect.signature(model.forward).parameters)), time_argument(model)

    def run(weights, sample, t, condition):
        seen: dict[str, Any] = {}
        with ExitStack() as hooks:
            for name, layer in linears.items():
                see = lambda layer, args, out, name=name: seen.update({name: out})  # noqa: E731
                hooks.callback(layer.register_forward_hook(see).remove)
            torch.func.functional_call(model, weights, (), {first: sample, time: t, **condition})
        ran[:] = seen
        return list(seen.values())

    weights = {f"{name}.weight": layer.weight.detach() for name, layer in linears.items()}
    try:
        pure = torch.func.functionalize(run, remove="mutations")  # in place, values would get past the arrows of the graph
        return make_fx(pure, tracing_mode="fake", _allow_non_fake_inputs=True)(weights, *call), ran
    except Exception as error:
        message = f"A model must be traced to find what carries t; {type(model).__name__} cannot be: {error!r:.300}. Pass its "
        raise TDQError(message + "condition, or recorded calls as data; or leave these layers in full precision.") from error


def _origins(graph, kinds, outs):
    """Of each node: the kinds of input that it comes from, and the layers whose outputs it comes by."""
    names = {node: name for name, node in outs.items()}
    needs: dict[Any, set] = {}
    comes_by: dict[Any, set] = {}
    inputs = iter(kinds)
    for node in graph.nodes:
        needs[node] = {next(inputs)} if node.op == "placeholder" else set().union(*(needs[n] for n in node.all_input_nodes))
        before = node.all_input_nodes
        comes_by[node] = set().union(*(comes_by[n] | ({names[n]} if n in names else set()) for n in before))
    return needs, comes_by


def _cut(graph, outs):
    """Leave of a graph what leads to ``outs``."""
    ends = graph.graph.output_node()
    ends.args = (outs,)
    needed = {ends}
    for node in reversed(graph.graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    for node in reversed(list(graph.graph.nodes)):
        if node not in needed and node.op != "placeholder":
            graph.graph.erase_node(node)
    graph.recompile()
