"""What it means in the tests that two maps are equal, and that a model was left alone."""

import torch

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def close(one, other):
    """Equal to 1e-5 of the map's maximum in float32, 1e-10 in float64."""
    tolerance = 1e-10 if one.dtype == torch.float64 else 1e-5
    scale = max(float(one.abs().max()), 1e-300)
    return one.shape == other.shape and float((one - other).abs().max()) <= scale * tolerance


def state_of(model):
    """Parameters with their gradients and flags, buffers, every module's own flag, hooks and attributes, modes."""
    parameters = {
        name: (p, p.detach().clone(), p.grad, None if p.grad is None else p.grad.clone(), p.requires_grad)
        for name, p in model.named_parameters()
    }
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    hooks = [dict(getattr(m, kind)) for m in model.modules() for kind in HOOKS]  # the very same functions
    modules = [(m.training, set(vars(m))) for m in model.modules()]
    return parameters, buffers, [hooks, modules, torch.is_grad_enabled()], torch.get_rng_state()


def assert_same_state(before, after):
    for name, (p, value, grad, grad_value, requires_grad) in before[0].items():
        other, other_value, other_grad, other_grad_value, other_requires = after[0][name]
        assert p is other and torch.equal(value, other_value) and requires_grad == other_requires, name
        assert grad is other_grad and (grad is None or torch.equal(grad_value, other_grad_value)), name
    assert all(torch.equal(value, after[1][name]) for name, value in before[1].items())
    assert before[2] == after[2] and torch.equal(before[3], after[3])
