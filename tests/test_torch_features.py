"""Each feature of PyTorch that is no public interface and that sightline leans on, by the place that needs it.

When a new release fails here, the test's name and comment say which lines to change.
"""

import copy
import inspect

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sightline.explainers import tokens
from sightline.inference import version_of
from sightline.inference.operations import Operation, Operations, unseen


class Heard(Operations):
    """Every operation, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Operation] = []

    def on(self, operation):
        self.heard.append(operation)
        return operation()


def features(channels_last=False):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.rand(2, 3, 4, 5).contiguous(memory_format=layout).requires_grad_()


def nodes(tensor):
    """The graph behind a tensor, along the first input that has one."""
    node = tensor.grad_fn
    while node is not None:
        yield node
        node = next((each for each, _ in node.next_functions if each is not None), None)


def named(tensor, name):
    return next(node for node in nodes(tensor) if node.name() == name)


# explainers/capture/head.py


def test_the_weights_of_linear_layers_are_saved_by_their_nodes():
    layer, x = nn.Linear(3, 4), torch.rand(2, 3, requires_grad=True)
    with_bias = named(layer(x), "AddmmBackward0")
    assert torch.equal(with_bias._saved_mat2.mT, layer.weight)
    assert with_bias.next_functions[1][0].variable is x
    without = named(F.linear(x, layer.weight), "MmBackward0")
    assert torch.equal(without._saved_mat2.mT, layer.weight)
    assert without.next_functions[0][0].variable is x


def test_convolutions_save_what_they_are():
    layer = nn.Conv2d(3, 4, 1)
    node = named(layer(features()), "ConvolutionBackward0")
    assert torch.equal(node._saved_weight, layer.weight)
    assert not node._saved_transposed and node._saved_groups == 1
    assert [*node._saved_padding] == [0, 0] and [*node._saved_stride] == [1, 1]


@pytest.mark.parametrize("pool", [lambda x: x.mean((-2, -1)), nn.AdaptiveAvgPool2d(1)])
def test_means_save_their_dimensions(pool):
    node = named(pool(features()), "MeanBackward1")
    assert [*node._saved_self_sym_sizes] == [2, 3, 4, 5]
    assert {dim - 2**64 if dim >= 2**63 else dim for dim in node._saved_dim} <= {-2, -1, 2, 3}


def test_average_poolings_save_their_kernels():
    node = named(F.avg_pool2d(features(), (4, 5)), "AvgPool2DBackward0")
    assert tuple(node._saved_self.shape) == (2, 3, 4, 5) and [*node._saved_kernel_size] == [4, 5]
    assert [*node._saved_padding] == [0, 0] and node._saved_divisor_override is None


def test_adaptive_pooling_strides_the_mean_of_channels_last_anew():
    x = features().detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    node = F.adaptive_avg_pool2d(x, 1).grad_fn
    assert node.name() == "AsStridedBackward1" and node.next_functions[0][0].name() == "MeanBackward1"
    assert tuple(node._saved_stride[:2]) == (3, 1) and not node._saved_storage_offset


def test_selections_save_their_dimension():
    node = named(torch.rand(2, 3, 1, requires_grad=True)[..., 0], "SelectBackward0")
    assert node._saved_self_sym_sizes[node._saved_dim if node._saved_dim < 2**63 else node._saved_dim - 2**64] == 1


@pytest.mark.parametrize(
    ("name", "reshape"),
    [
        ("CloneBackward0", Tensor.clone),
        ("SqueezeBackward0", Tensor.squeeze),
        ("SqueezeBackward1", lambda x: x.squeeze(2)),
        ("SqueezeBackward2", lambda x: x.squeeze((2, 3))),
        ("ToCopyBackward0", Tensor.double),
        ("UnsqueezeBackward0", lambda x: x.unsqueeze(0)),
        ("ViewBackward0", lambda x: x.flatten(1)),
        ("UnsafeViewBackward0", lambda x: x.transpose(0, 1).reshape(-1)),
    ],
)
def test_reshapes_have_these_nodes(name, reshape):
    x = torch.rand(2, 3, 1, 1, requires_grad=True)
    assert reshape(x).grad_fn.name() == name


# explainers/tokens.py


def test_multi_head_attention_asks_once_whether_to_hand_itself_to_a_mode():
    """Without that question, a mode sees the attention inside."""
    assert "has_torch_function" in F.multi_head_attention_forward.__code__.co_names
    layer, x = nn.MultiheadAttention(4, 2).eval(), torch.rand(5, 1, 4, requires_grad=True)
    with Heard() as mode:
        expected, _ = layer(x, x, x, need_weights=False)
    assert F.multi_head_attention_forward in [each.func for each in mode.heard]
    call = next(each for each in mode.heard if each.func is F.multi_head_attention_forward)
    with Heard() as inside:
        output, _ = tokens._multi_head_attention(*call.args, **call.kwargs)
    assert F.scaled_dot_product_attention in [each.func for each in inside.heard]
    assert torch.allclose(output, expected)


def test_a_module_runs_in_a_frame_that_holds_it_and_its_arguments():
    assert {"self", "args", "kwargs"} <= {*nn.Module._call_impl.__code__.co_varnames}
    seen = []

    class Model(nn.Module):
        def forward(self, x):
            frame = inspect.currentframe()
            while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
                frame = frame.f_back
            seen.append(frame.f_locals)
            return x

    model, x = Model(), torch.rand(1)
    model(x)
    assert seen[0]["self"] is model and seen[0]["args"][0] is x


# inference/operations.py, and all that listens


def test_a_mode_sees_functions_methods_operators_and_attributes():
    x = torch.rand(2, 2)
    with Heard() as mode:
        torch.relu(x), x.relu_(), x + 1, x @ x, x[0], x.T, F.relu(x), torch.special.expit(x)
    names = [each.name for each in mode.heard]
    assert names[:6] == ["relu", "relu", "add", "matmul", "getitem", "T"]
    assert names[6] == "relu" and "expit" in names[7]
    assert [each.is_in_place for each in mode.heard[:3]] == [False, True, False]
    assert [each.reads_attribute for each in mode.heard[4:6]] == [False, True]


def test_a_mode_is_off_inside_its_own_handler():
    class Twice(Operations):
        calls = 0

        def on(self, operation):
            self.calls += 1
            return operation() + 0

    with Twice() as mode:
        torch.ones(2).exp()
    assert mode.calls == 2  # ones and exp, not what the handler does


def test_a_copy_of_a_tensor_goes_through_the_mode():
    """inference/copies.py leaves graphs out of copies there."""
    x = torch.rand(2)
    with Heard() as mode:
        copy.deepcopy(x)
    assert Tensor.__deepcopy__ in [each.func for each in mode.heard]


# attention/places.py


def test_a_dispatch_mode_sees_which_arguments_are_written_to():
    written = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            arguments = func._schema.arguments
            written.append([a.alias_info is not None and a.alias_info.is_write for a in arguments][:1])
            return func(*args, **(kwargs or {}))

    x = torch.rand(2)
    with Mode():
        x.add_(1)
        x.add(1)
    assert written == [[True], [False]]


# inference/preserve.py and inference/probabilities.py


def test_modes_of_the_thread_can_be_counted_and_ended():
    before = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()
    with Heard():
        assert torch._C._len_torch_function_stack() == before[0] + 1
        assert torch._C._len_torch_dispatch_stack() == before[1]
    with torch.inference_mode():
        left = torch._C._InferenceMode(False)
        left.__enter__()
        assert not torch.is_inference_mode_enabled()
        left.__exit__(None, None, None)
        assert torch.is_inference_mode_enabled()


def test_modules_keep_their_state_in_their_attributes():
    module = nn.BatchNorm2d(2)
    assert {"training", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"} <= vars(module).keys()
    assert nn.Module._compiled_call_impl is None
    handle = module.register_forward_hook(lambda *args: None)
    assert len(vars(module)["_forward_hooks"]) == 1
    handle.remove()


def test_modes_do_not_see_what_runs_unseen():
    x = torch.zeros(2)
    with Heard() as mode:
        with unseen():
            assert x.shape == (2,)
            assert torch.equal(x + 1, torch.ones(2))
        assert not mode.heard
        x.add_(1)
    assert [operation.name for operation in mode.heard] == ["add"]


def test_a_method_of_pytorch_equals_itself_at_the_next_call():
    with Heard() as mode:
        for _ in range(2):
            assert torch.zeros(1, 2, 4, 4).relu().shape == (1, 2, 4, 4)
            F.batch_norm(torch.zeros(1, 1, 2, 2), torch.zeros(1), torch.ones(1))
    functions = [operation.func for operation in mode.heard]
    assert functions[: len(functions) // 2] == functions[len(functions) // 2 :]


def test_tensors_count_their_changes_in_place():
    x = torch.zeros(2)
    x.add_(1)
    assert version_of(x) == x._version == 1
    with torch.inference_mode():
        assert version_of(torch.zeros(2)) == 0


# explainers/rectifiers.py


def test_the_backwards_of_rectifiers_can_be_called():
    grad, x = torch.ones(3), torch.tensor([-1.0, 1.0, 7.0])
    assert torch.ops.aten.threshold_backward(grad, x, 0).tolist() == [0, 1, 1]
    assert torch.ops.aten.hardtanh_backward(grad, x, 0, 6).tolist() == [0, 1, 0]
