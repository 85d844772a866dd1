"""Operations on state trees."""

import json
from typing import NamedTuple

import pytest
import torch

from nestlearn.memory.types import State
from nestlearn.nn import state as trees


def example(rows=3):
    def w():
        return torch.randn(rows, 2, 4)

    memory = State({"W": w()}, None, {"W": w()}, torch.arange(rows), aligned=True)
    return {"memory": memory, "tail": (w(), None), "list": [w()], "flag": True}


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        return
    children, others = trees.children_of(a), trees.children_of(b)
    if children is None:
        assert a == b
        return
    assert [name for name, _ in children] == [name for name, _ in others]
    for (_, x), (_, y) in zip(children, others, strict=True):
        assert_same(x, y)


def test_flatten_and_back_through_json():
    tree = example()
    tensors, spec = trees.flatten_state(tree)
    assert_same(trees.unflatten_state(tensors, json.loads(json.dumps(spec))), tree)


def test_rows_are_indexed():
    tree = example()
    picked = trees.index_rows(tree, torch.tensor([2, 2]))
    torch.testing.assert_close(picked["memory"].params["W"], tree["memory"].params["W"][[2, 2]])
    assert picked["memory"].aligned


def test_reset_rows_takes_fresh_rows_and_loses_alignment():
    tree, fresh = example(), example()
    merged = trees.reset_rows(tree, fresh, torch.tensor([True, False, True]))
    torch.testing.assert_close(merged["tail"][0][0], fresh["tail"][0][0])
    torch.testing.assert_close(merged["tail"][0][1], tree["tail"][0][1])
    assert merged["memory"].aligned is False


def test_reset_rows_refuses_another_structure():
    with pytest.raises(ValueError, match="shape"):
        trees.reset_rows(torch.zeros(2, 3), torch.zeros(2, 4), torch.tensor([True, False]))
    with pytest.raises(ValueError, match="holds"):
        trees.reset_rows({"a": None}, {"b": None}, torch.tensor([True]))


def test_bytes_count_shared_memory_once():
    x = torch.zeros(2, 8)
    assert trees.state_bytes({"a": x, "b": x, "c": x[:1]}) == 64


def test_detach_and_clone_cut_graph_and_memory():
    x = torch.zeros(2, requires_grad=True) * 1
    assert not trees.detach([x])[0].requires_grad
    copy = trees.clone([x.detach()])
    copy[0].add_(1)
    assert x.detach().eq(0).all()


def test_a_leaf_that_is_no_state_is_refused():
    with pytest.raises(TypeError, match="object at state.a"):
        trees.flatten_state({"a": object()})


def test_files_name_records_and_not_their_classes():
    """A class may be renamed and moved; a record without a name is refused before anything is written."""

    class Nameless(NamedTuple):
        x: torch.Tensor

    with pytest.raises(TypeError, match="Nameless.*record"):
        trees.flatten_state(Nameless(torch.zeros(1)))
    tensors, spec = trees.flatten_state(trees.record("tests.moved")(Nameless)(torch.zeros(1)))
    assert spec["type"] == "tests.moved" and "Nameless" not in json.dumps(spec)

    class Renamed(NamedTuple):
        x: torch.Tensor

    with pytest.raises(ValueError, match="belongs to"):
        trees.record("tests.moved")(Renamed)
    trees._RECORDS["tests.moved"] = Renamed
    assert type(trees.unflatten_state(tensors, spec)) is Renamed


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], "mapping"),
        ({"tensor": "missing"}, "missing"),
        ({"kind": "tuple"}, "keys"),
        ({"kind": "record", "type": "os:system", "names": [], "children": []}, "nothing has registered"),
        ({"kind": "record", "type": "gates", "names": [], "children": []}, "fields"),
    ],
)
def test_a_malformed_description_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        trees.unflatten_state({}, spec)
